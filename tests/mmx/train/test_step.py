"""The training step: objective, accumulation, AdamW, skipping; and micro-batches and evaluation on a mesh."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmx.config import MeshConfig, OptimizerConfig
from mmx.model.text import bind
from mmx.parallel import build_mesh
from mmx.train.evaluate import heldout_loss, heldout_sums
from mmx.train.loss import Batch, loss_sums
from mmx.train.optimizer import build_optimizer
from mmx.train.step import TrainState, init_state, train_step
from tests.tiny import TINY, params, tiny, tokens

OPTIMIZER = OptimizerConfig(peak_lr=1e-2)


def packed_batch(rows: int = 8, length: int = 24) -> Batch:
    """Rows with documents of unequal numbers, one row with padding."""
    ids = tokens(rows, length + 1)
    segments = np.ones((rows, length + 1), np.int32)
    segments[0, 5:] = 2
    segments[1, 3:9], segments[1, 9:] = 2, 3
    segments[2, 10:] = 0
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        for place in range(1, length):
            same_document = segments[row, place] == segments[row, place - 1]
            positions[row, place] = positions[row, place - 1] + 1 if same_document else 0
    return Batch(
        *(jnp.asarray(x) for x in (ids[:, :-1], np.where(same, ids[:, 1:], 0), segments[:, :-1], positions)),
        jnp.asarray(same, jnp.float32),
    )


@functools.cache
def compiled_step(config, micro_batches: int = 1, clip_norm: float = 1.0):
    optimizer = build_optimizer(OPTIMIZER)
    return jax.jit(functools.partial(train_step, config, optimizer, clip_norm, micro_batches))


def fresh_state(config=TINY) -> TrainState:
    optimizer = build_optimizer(OPTIMIZER)
    return jax.jit(functools.partial(init_state, config, optimizer, 0))()


def test_loss_is_the_mean_over_targets():
    batch = packed_batch()
    objective, sums = jax.jit(functools.partial(loss_sums, TINY, dropless=True))(params(), batch)
    model = bind(TINY, params())
    x, stats, _ = model(batch.tokens_BS, segment_ids_BS=batch.segment_ids_BS, valid_BS=batch.segment_ids_BS > 0)
    log_p = jax.nn.log_softmax(model.logits(x))
    nll = -jnp.take_along_axis(log_p, batch.targets_BS[..., None], axis=-1)[..., 0]
    assert sums.tokens == batch.weights_BS.sum()
    np.testing.assert_allclose(sums.nll, jnp.sum(nll * batch.weights_BS), rtol=1e-5)
    auxiliary = TINY.aux_loss_coefficient * jnp.sum(stats.load.share_E * stats.load.probability_E) / TINY.num_experts
    np.testing.assert_allclose(objective / sums.tokens, sums.nll / sums.tokens + auxiliary, rtol=1e-5)


def test_accumulation_weighs_every_token_alike():
    # Micro-batches have different numbers of targets; with the auxiliary loss off the result must be the same.
    config = tiny(aux_loss_coefficient=0.0)
    batch, state = packed_batch(), fresh_state(config)
    want, want_metrics = compiled_step(config)(state, batch, 1e-2)
    got, metrics = compiled_step(config, micro_batches=2)(state, batch, 1e-2)
    np.testing.assert_allclose(metrics.loss, want_metrics.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.grad_norm, want_metrics.grad_norm, rtol=1e-5)
    np.testing.assert_allclose(metrics.stats.load.share_E.sum(-1), TINY.experts_per_token, rtol=1e-5)
    moments = lambda state: jax.tree.leaves(state.optimizer)  # noqa: E731
    for a, b in zip(moments(got), moments(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_update_is_adamw(clip_norm):
    config = tiny(aux_loss_coefficient=0.0)
    batch, state = packed_batch(), fresh_state(config)
    step = compiled_step(config, clip_norm=clip_norm)
    decayed = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)  # noqa: E731
    reference = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decayed)
    if clip_norm:
        reference = optax.chain(optax.clip_by_global_norm(clip_norm), reference)

    def mean_loss(params):
        objective, sums = loss_sums(config, params, batch, dropless=False)
        return objective / sums.tokens

    want, optimizer_state = state.params, reference.init(state.params)
    for _ in range(3):
        grads = jax.jit(jax.grad(mean_loss))(want)
        updates, optimizer_state = reference.update(grads, optimizer_state, want)
        want = optax.apply_updates(want, updates)
        state, metrics = step(state, batch, 1e-2)
    assert metrics.skipped == 0
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # Adam's first steps magnify rounding where gradients are tiny.
        assert np.abs(a - b).mean() < 2e-6


def test_non_finite_step_changes_nothing_and_is_counted():
    batch, state = packed_batch(), fresh_state()
    poisoned = batch._replace(weights_BS=batch.weights_BS.at[0, 0].set(jnp.nan))
    after, metrics = compiled_step(TINY)(state, poisoned, 1e-2)
    assert metrics.skipped == after.skipped == 1
    assert metrics.bad_in_a_row == after.health.bad_in_a_row == 1
    for a, b in zip(jax.tree.leaves(after[:2]), jax.tree.leaves(state[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    later, metrics = compiled_step(TINY)(after, batch, 1e-2)
    assert metrics.skipped == 1
    assert metrics.bad_in_a_row == 0
    assert np.isfinite(metrics.loss)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(later), jax.tree.leaves(after), strict=True))


def run_on_mesh(sizes: MeshConfig | None):
    """Two steps and an evaluation on a mesh; None is a single device without one."""
    config = TINY
    with contextlib.ExitStack() as stack:
        if sizes is not None:
            stack.enter_context(jax.set_mesh(build_mesh(sizes, jax.devices()[: sizes.replica * sizes.fsdp])))
        optimizer = build_optimizer(OPTIMIZER)
        state = jax.jit(functools.partial(init_state, config, optimizer, 0))()
        batch = packed_batch()
        if sizes is not None:
            batch = jax.tree.map(
                lambda x: jax.device_put(x, jax.P(("replica", "fsdp", "expert", "expert_tensor"))), batch
            )
        step = jax.jit(functools.partial(train_step, config, optimizer, 1.0, 2))
        losses = []
        for _ in range(2):
            state, metrics = step(state, batch, 1e-2)
            losses.append((float(metrics.loss), float(metrics.grad_norm)))
        sums = jax.jit(functools.partial(heldout_sums, config))
        token_bytes = jnp.arange(config.vocab_size, dtype=jnp.float32)
        heldout = heldout_loss(lambda batch: sums(state.params, batch, token_bytes), [batch])
        split = state.params["runs"]["0_lightning"]["attention"]["query"].sharding
        load = jax.device_get(metrics.stats.load.share_E)
    return losses, tuple(heldout), load, split


@pytest.fixture(scope="module")
def single_device():
    return run_on_mesh(None)


def test_accumulation_and_evaluation_on_a_mesh(single_device):
    # tests/mmx/parallel/test_meshes.py has the other axes.
    sizes = MeshConfig(replica=2, fsdp=2)
    want_losses, want_heldout, want_load, _ = single_device
    losses, heldout, load, split = run_on_mesh(sizes)
    np.testing.assert_allclose(losses, want_losses, rtol=2e-4)
    np.testing.assert_allclose(heldout, want_heldout, rtol=2e-4)
    np.testing.assert_allclose(load, want_load, atol=0.05)  # A near tie may route one token of 50 elsewhere.
    assert split.shard_shape((2, 2, 24, 4, 8))[2] == 24 // sizes.fsdp
