"""Forms of the grouped matrix product at the shapes of ``configs/text_1b.py``.

Shapes: M rows, E experts, D hidden, F expert hidden (gate and up side by side).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from configs.text_1b import get_config
from mmx.bench.gpu.attention import BACKWARD, FORWARD, describe
from mmx.bench.gpu.clock import seconds_a_call
from pallas_kernels.grouped_matmul import grouped_matmul

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink

TOKENS = (8192, 65536)


def measure(sink: Sink) -> None:
    """Every implementation over uneven groups, and a batched product over even ones as the ceiling of padded forms."""
    model = get_config().model
    E, D, F = model.num_experts, model.hidden_size, 2 * model.expert_hidden_size
    for tokens in TOKENS:
        M = tokens * model.experts_per_token
        rng = np.random.default_rng(0)
        sizes_E = rng.multinomial(M, rng.dirichlet(np.full(E, 20.0)))
        sink.say(f"{tokens:,} tokens, groups of {sizes_E.min():,} to {sizes_E.max():,} rows")
        shapes = ((M, D), (E, D, F), (M, F))
        operands = [jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n, shape in enumerate(shapes)]
        grouped = functools.partial(grouped_matmul, group_sizes_E=jnp.asarray(sizes_E, jnp.int32))
        for name in ("blocked", "padded", "ragged"):
            _time(sink, name, tokens, functools.partial(grouped, implementation=name), *operands)
        _time(sink, "batched over even groups", tokens, _batched, *operands)


def _batched(x_MD: jax.Array, w_EDF: jax.Array) -> jax.Array:
    E, D, F = w_EDF.shape
    return jnp.einsum("erd,edf->erf", x_MD.reshape(E, -1, D), w_EDF).reshape(-1, F)


def _time(
    sink: Sink,
    name: str,
    tokens: int,
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x_MD: jax.Array,
    w_EDF: jax.Array,
    dy_MF: jax.Array,
) -> None:
    @jax.jit
    def gradients(x_MD, w_EDF, dy_MF):
        y_MF, back = jax.vjp(product, x_MD, w_EDF)
        return y_MF, back(dy_MF)

    forward = jax.jit(product)
    once = 2 * x_MD.shape[0] * x_MD.shape[1] * dy_MF.shape[1]
    for direction, flops, call in (
        (FORWARD, once, lambda: forward(x_MD, w_EDF)),
        (BACKWARD, 3 * once, lambda: gradients(x_MD, w_EDF, dy_MF)),
    ):
        try:
            seconds = seconds_a_call(call, jax.block_until_ready)
        except Exception as error:
            reason = describe(error)
            sink.result(f"{name}, {direction}: {reason}", name=name, direction=direction, tokens=tokens, failed=reason)
            continue
        sink.result(
            f"{name}, {direction}: {seconds * 1e3:.2f} ms, {flops / seconds / 1e12:.0f} TFLOP/s",
            name=name,
            direction=direction,
            tokens=tokens,
            seconds=seconds,
            flops_per_second=flops / seconds,
        )
