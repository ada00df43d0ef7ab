"""Causal softmax attention of whole rows on TPU: jax's splash attention kernels, with a backward pass of our own.

A row is a part of itself: ``tpu_part.py`` calls the kernels, on both cores of a chip that has two where the heads can
be halved. ``tpu_tables.py`` tells them which pairs of blocks the documents leave. Key-value heads are not repeated: the
kernels map a group of query heads to theirs.

Shapes: B batch, S tokens, H query heads, G key-value heads, K key channels, V value channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.segments import document_runs
from pallas_kernels.softmax_attention.pairs import SOFTMAX_RESIDUALS
from pallas_kernels.softmax_attention.part import Places
from pallas_kernels.softmax_attention.tpu_kernels import Kernels
from pallas_kernels.softmax_attention.tpu_part import attention_part_gradients_tpu, attention_part_tpu
from pallas_kernels.softmax_attention.tpu_tables import SCALAR_BYTES, largest_block, table_bytes

_CHANNELS = (64, 128, 256)
_MOST_TOKENS = 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def softmax_attention_tpu(
    q_BSHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    segment_ids_BS: jax.Array | None,
    scale: float,
    kernels: Kernels,
) -> jax.Array:
    """Softmax attention; ``op.py`` states the contract.

    Args:
      kernels: with blocks of powers of two from 128 tokens.
    """
    return _forward(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, kernels)[0]


def _forward(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, kernels):
    q_BSHK, places = _with_places(q_BSHK, segment_ids_BS)
    parts = []
    for own, seen in _cuts(q_BSHK.shape[1], kernels):
        operands = q_BSHK[:, own], k_BSGK[:, seen], v_BSGV[:, seen], places.cut(own), places.cut(seen)
        parts.append(attention_part_tpu(*operands, scale, seen.stop, kernels))
    o_BSHV, lse_BSH = (
        checkpoint_name(jnp.concatenate(pieces, axis=1), SOFTMAX_RESIDUALS) for pieces in zip(*parts, strict=True)
    )
    return o_BSHV, (q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, o_BSHV, lse_BSH)


def _backward(scale, kernels, residuals, do_BSHV):
    q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, o_BSHV, lse_BSH = residuals
    delta_BSH = jnp.sum(do_BSHV.astype(lse_BSH.dtype) * o_BSHV, axis=-1)
    q_BSHK, places = _with_places(q_BSHK, segment_ids_BS)
    parts = []
    for own, seen in _cuts(q_BSHK.shape[1], kernels):
        operands = q_BSHK[:, own], k_BSGK[:, seen], v_BSGV[:, seen], places.cut(own), places.cut(seen)
        of_queries = (x[:, own] for x in (do_BSHV, lse_BSH, delta_BSH))
        parts.append(attention_part_gradients_tpu(*operands, scale, seen.stop, kernels, *of_queries))
    dq_parts, dk_parts, dv_parts = zip(*parts, strict=True)
    # The last piece saw all keys, those before it the first ones.
    dk_BSGK, dv_BSGV = (functools.reduce(_add_to_first, reversed(x)).astype(v_BSGV.dtype) for x in (dk_parts, dv_parts))
    return jnp.concatenate(dq_parts, axis=1).astype(q_BSHK.dtype), dk_BSGK, dv_BSGV, None


softmax_attention_tpu.defvjp(_forward, _backward)


def unsupported(q_BSHK: jax.Array, v_BSGV: jax.Array) -> str | None:
    """Why the kernels, as far as they are tested, do not take these operands, or None."""
    S, K, V = q_BSHK.shape[1], q_BSHK.shape[-1], v_BSGV.shape[-1]
    if q_BSHK.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 and float32, not {q_BSHK.dtype}"
    if not {K, V} <= set(_CHANNELS):
        return f"the TPU kernels take heads of 64, 128 or 256 channels, not K={K} and V={V}"
    if S > _MOST_TOKENS:
        return f"the TPU kernels take rows of up to {_MOST_TOKENS:,} tokens, not {S:,}"
    return None


def _with_places(q_BSHK: jax.Array, segment_ids_BS: jax.Array | None) -> tuple[jax.Array, Places]:
    """q, and where its tokens lie. Tied to q: rematerialisation would number the documents once for both passes."""
    positions_BS = jnp.arange(q_BSHK.shape[1], dtype=jnp.int32)[None]
    if segment_ids_BS is None:
        return q_BSHK, Places(positions_BS, None)
    q_BSHK, segment_ids_BS = lax.optimization_barrier((q_BSHK, segment_ids_BS))
    return q_BSHK, Places(positions_BS, document_runs(segment_ids_BS))


def _cuts(length: int, kernels: Kernels) -> list[tuple[slice, slice]]:
    """Pieces of a row's queries, so many that the tables of each fit, with all keys that any of them may see."""
    largest = largest_block(kernels.blocks)
    count, pieces = -(-length // largest), 1
    step = count * largest
    while pieces < count and table_bytes(step, count * largest, kernels.blocks) > SCALAR_BYTES:
        pieces += 1
        step = -(-count // pieces) * largest
    ends = [min(length, start + step) for start in range(0, length, step)]
    return [(slice(start, end), slice(end)) for start, end in zip([0, *ends], ends, strict=False)]


def _add_to_first(whole_BSGD: jax.Array, first_BSGD: jax.Array) -> jax.Array:
    """Adds to the first tokens of a row."""
    behind = whole_BSGD.shape[1] - first_BSGD.shape[1]
    return whole_BSGD + jnp.pad(first_BSGD, ((0, 0), (0, behind), (0, 0), (0, 0)))
