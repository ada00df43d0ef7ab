"""Calls of the TPU kernels at given sizes: what is compiled ahead of time, profiled and tuned.

Each function returns a function and the shapes of its arguments, and takes JSON values. Shapes: B batch, S tokens, H
heads, K key channels, V value channels, D heads x channels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lightning_attention import tpu_backward, tpu_decode, tpu_forward
from pallas_kernels.lightning_attention.tpu_block import Boundaries
from pallas_kernels.lightning_attention.tpu_plan import F32, Plan, Tiles
from pallas_kernels.lightning_attention.tpu_tiles import packed

Case = tuple[Callable, tuple[Any, ...]]
Shape = jax.ShapeDtypeStruct


def forward(*, keep_states: bool = False, **sizes: Any) -> Case:
    """The forward kernel alone."""
    plan, operands, B, H = _call(**sizes)
    state = Shape((B, H, plan.key, plan.value), F32)

    def call(q, k, v, do, slopes, boundaries, initial):
        return tpu_forward.forward(plan, q, k, v, slopes, boundaries, initial, keep_states)

    return call, (*operands, state)


def backward(**sizes: Any) -> Case:
    """The backward kernel alone."""
    plan, operands, B, H = _call(**sizes)
    state = Shape((B, H, plan.key, plan.value), F32)
    states = Shape((B, plan.blocks, H, plan.key, plan.value), F32)

    def call(q, k, v, do, slopes, boundaries, states, dfinal):
        return tpu_backward.backward(plan, q, k, v, do, slopes, boundaries, states, dfinal)

    return call, (*operands, states, state)


def decode(*, batch: int, tokens: int, heads: int, key: int = 128, value: int = 128, dtype: str = "bfloat16") -> Case:
    """The decode kernel alone, its state donated."""
    q, v = (Shape((batch, tokens, heads, width), jnp.dtype(dtype)) for width in (key, value))
    # Not donated, the state would be copied first, perhaps into VMEM, and moving it be no part of the count.
    return jax.jit(tpu_decode.decode, donate_argnums=4), (
        q,
        q,
        v,
        Shape((heads,), F32),
        Shape((batch, heads, key, value), F32),
    )


def _call(
    *,
    tokens: int,
    heads: int,
    tiles: dict[str, Any],
    batch: int = 1,
    key: int = 128,
    value: int = 128,
    dtype: str = "bfloat16",
    documents: bool = False,
) -> tuple[Plan, tuple[Any, ...], int, int]:
    sizes, P = Tiles(**tiles), packed(heads, key, value)
    heads, key, value = heads // P, key * P, value * P
    plan = Plan(sizes, tokens, min(sizes.heads, heads), key, value, jnp.dtype(dtype), documents, False, P)
    q, v = (Shape((batch, tokens, heads * width), plan.dtype) for width in (key, value))
    boundaries = None
    if documents:
        boundaries = jax.eval_shape(lambda starts: Boundaries.of(starts, sizes), Shape((batch, tokens), jnp.bool_))
    return plan, (q, q, v, v, Shape((heads * P,), F32), boundaries), batch, heads
