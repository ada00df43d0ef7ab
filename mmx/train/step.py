"""One training step: accumulate gradients over micro-batches, clip, AdamW, and skip what is not finite or a spike.

Shapes: A micro-batches, B batch, S tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, SingleDeviceSharding

from mmx.config import ModelConfig
from mmx.model.experts import ExpertStats
from mmx.model.text import Params, init_params
from mmx.parallel import constrain
from mmx.train.health import Health, fresh_health, judge
from mmx.train.loss import Batch, LossSums, loss_sums
from mmx.train.noise_scale import GradientNoise, gradient_noise


class TrainState(NamedTuple):
    """What a step changes."""

    params: Params
    optimizer: Any
    skipped: jax.Array  # steps so far that did not count, int32
    health: Health


class StepMetrics(NamedTuple):
    """What a step reports; means are over its target tokens."""

    loss: jax.Array  # nats a token, without the auxiliary loss
    grad_norm: jax.Array  # global norm before clipping
    stats: ExpertStats
    skipped: jax.Array  # as in the state after the step
    bad_in_a_row: jax.Array  # likewise
    noise: GradientNoise | None = None  # with more than one micro-batch


class MicroBatchNorms(NamedTuple):
    """What the gradients of single micro-batches say of their noise; fp32 scalars."""

    square: jax.Array  # sum of the squared norms, each divided by its micro-batch's target tokens
    count: jax.Array  # micro-batches with any


class TokenSums(NamedTuple):
    """Sums over the target tokens of a batch."""

    sums: LossSums
    grads: Params  # of the objective's sum
    parts: MicroBatchNorms | None  # with more than one micro-batch


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state, the same for the same seed on any mesh. Call it under ``jax.jit``."""
    return start_state(optimizer, init_params(config, jax.random.key(seed)))


def start_state(optimizer: optax.GradientTransformation, params: Params) -> TrainState:
    """The state of a run that starts from given parameters. Call it under ``jax.jit``."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), fresh_health())


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of a state, and where its arrays lie: on the mesh in scope, or on the first device."""
    return _placed(jax.eval_shape(lambda: init_state(config, optimizer, seed=0)))


def abstract_params(config: ModelConfig) -> Params:
    """The parameters' part of ``abstract_state``."""
    return _placed(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


def _placed(shapes: Any) -> Any:
    mesh = jax.sharding.get_mesh()

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if mesh.empty:
            sharding = SingleDeviceSharding(jax.devices()[0])
        else:
            sharding = NamedSharding(mesh, jax.P() if x.sharding is None else x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)


def train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    micro_batches: int,
    state: TrainState,
    batch: Batch,
    rate: jax.Array,
    spike_factor: float = 0.0,
) -> tuple[TrainState, StepMetrics]:
    """Takes one optimizer step on a batch.

    A step whose loss or gradient is not finite, or whose loss is a spike, leaves parameters and optimizer as they were
    and is counted.

    Args:
      config, optimizer, micro_batches: fixed; bind them before ``jax.jit``.
      batch: B is a multiple of ``micro_batches``.
      rate: learning rate, fp32 scalar.
      spike_factor: see ``mmx.train.health.judge``.
    """
    total = token_sum_gradient(config, micro_batches, state.params, batch)
    return apply_gradient(optimizer, clip_norm, state, total, rate, spike_factor)


def apply_gradient(
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    state: TrainState,
    total: TokenSums,
    rate: jax.Array,
    spike_factor: float = 0.0,
) -> tuple[TrainState, StepMetrics]:
    """The second half of ``train_step``, from the sums over a batch."""
    sums, grads = total.sums, total.grads
    tokens = jnp.maximum(sums.tokens, 1)
    norm = optax.tree.norm(grads)
    grad_norm = norm / tokens
    noise = None if total.parts is None else gradient_noise(total.parts.square, norm**2, tokens, total.parts.count)
    good, health = judge(state.health, sums.nll / tokens, grad_norm, spike_factor)
    # Mean over tokens and clipping are one factor: the gradient is read once more, not three times.
    clip = jnp.minimum(1.0, clip_norm / grad_norm) if clip_norm else 1.0
    grads = jax.tree.map(lambda g: g * (clip / tokens).astype(g.dtype), grads)

    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), state.params, updates)
    params, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old), (params, optimizer_state), (state.params, state.optimizer)
    )
    skipped = state.skipped + jnp.where(good, 0, 1)
    stats = jax.tree.map(lambda x: x / tokens, sums.stats)
    metrics = StepMetrics(sums.nll / tokens, grad_norm, stats, skipped, health.bad_in_a_row, noise)
    return TrainState(params, optimizer_state, skipped, health), metrics


def token_sum_gradient(config: ModelConfig, micro_batches: int, params: Params, batch: Batch) -> TokenSums:
    """Sums over the whole batch, and the gradient of the objective's sum, one micro-batch in memory at a time.

    Args:
      config, micro_batches: as for ``train_step``.
    """

    def gradient(batch: Batch) -> tuple[LossSums, Params]:
        objective = lambda params: loss_sums(config, params, batch, dropless=False)  # noqa: E731
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return sums, grads

    if micro_batches == 1:
        return TokenSums(*gradient(batch), None)
    # Rows a, a + A, a + 2A, ... make micro-batch a: the rows of each device stay on it.
    batches_ABS = jax.tree.map(lambda x_BS: _split_rows(x_BS, micro_batches), batch)

    def part(batch: Batch) -> TokenSums:
        sums, grads = gradient(batch)
        square = optax.tree.norm(grads, squared=True) / jnp.maximum(sums.tokens, 1)
        return TokenSums(sums, grads, MicroBatchNorms(square, jnp.where(sums.tokens > 0, 1.0, 0.0)))

    def accumulate(total, batch):
        return jax.tree.map(jnp.add, total, part(batch)), None

    first, rest = jax.tree.map(lambda x: x[0], batches_ABS), jax.tree.map(lambda x: x[1:], batches_ABS)
    return lax.scan(accumulate, part(first), rest)[0]


def _split_rows(x_BS: jax.Array, micro_batches: int) -> jax.Array:
    """[B, S] to [A, B / A, S], the B / A split over devices as B was."""
    axes = ("batch", "attention_sequence")
    parts = (x_BS[row::micro_batches] for row in range(micro_batches))
    return constrain(jnp.stack([constrain(part, *axes) for part in parts]), None, *axes)
