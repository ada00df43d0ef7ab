"""Causal softmax attention on TPU: jax's splash attention kernels, told which pairs of blocks the documents leave.

``tpu_tables.py`` tells them. Key-value heads are not repeated: the kernel maps a group of query heads to theirs.

Shapes: B batch, S tokens, H query heads, G key-value heads, K key channels, V value channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
)

from pallas_kernels.segments import document_runs
from pallas_kernels.softmax_attention.pairs import SOFTMAX_RESIDUALS
from pallas_kernels.softmax_attention.part import Places
from pallas_kernels.softmax_attention.tpu_tables import (
    SCALAR_BYTES,
    key_tables,
    largest_block,
    not_behind,
    query_tables,
    table_bytes,
)

LANES = 128
_CHANNELS = (64, 128, 256)
_MOST_TOKENS = 2**20


def softmax_attention_tpu(
    q_BSHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    segment_ids_BS: jax.Array | None,
    scale: float,
    blocks: BlockSizes,
    interpret: Any = False,
) -> jax.Array:
    """Softmax attention; ``op.py`` states the contract.

    Args:
      blocks: sizes of the kernels' blocks, powers of two from 128.
      interpret: what ``pallas_call`` takes.
    """
    S = q_BSHK.shape[1]
    q_BSHK, runs_BS = (q_BSHK * scale).astype(q_BSHK.dtype), None
    # Tokens added behind the last belong to its document; no query before them sees them.
    padding = -S % largest_block(blocks)
    if segment_ids_BS is not None:
        # Tied to q: rematerialisation would compute the tables once for both passes of all layers and keep them.
        q_BSHK, segment_ids_BS = lax.optimization_barrier((q_BSHK, segment_ids_BS))
        runs_BS = jnp.pad(document_runs(segment_ids_BS), ((0, 0), (0, padding)), mode="edge")

    def heads_first(x_BSHK):
        return jnp.pad(x_BSHK, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)

    length = S + padding
    part = length // _parts(length, blocks)

    def one_row(operands):
        q_HSK, k_GSK, v_GSV, runs_S = operands
        positions_S = jnp.arange(length, dtype=jnp.int32)
        parts = []
        for end in range(part, length + 1, part):
            # These queries, and all keys that any of them may see.
            own, seen = slice(end - part, end), slice(end)
            q_places, k_places = (
                Places(positions_S[None, x], None if runs_S is None else runs_S[None, x]) for x in (own, seen)
            )
            segment_ids = None if runs_S is None else SegmentIds(runs_S[own], runs_S[seen])
            attend = _kernel(q_places, k_places, blocks, interpret)
            parts.append(attend(q_HSK[:, own], k_GSK[:, seen], v_GSV[:, seen], segment_ids))
        return jnp.concatenate(parts, axis=1)

    # Row by row: each has tables of its own.
    o_BHSV = lax.map(one_row, (*(heads_first(x) for x in (q_BSHK, k_BSGK, v_BSGV)), runs_BS))
    return o_BHSV.swapaxes(1, 2)[:, :S]


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


def choose_blocks(q_BSHK: jax.Array, v_BSGV: jax.Array) -> BlockSizes:
    """Sizes for these operands: the largest that every chip's default limit of 16 MiB of VMEM leaves room for."""
    S, K, V = q_BSHK.shape[1], q_BSHK.shape[-1], v_BSGV.shape[-1]
    wide = q_BSHK.dtype.itemsize > 2 or max(K, V) > LANES
    # No longer than the row: a power of two, so that the smaller divides the larger.
    most = max(LANES, 1 << (S - 1).bit_length())
    q, k, compute = (min(size, most) for size in ((512, 1024, 512) if wide else (1024, 2048, 512)))
    return BlockSizes(q, k, compute, q, k, compute, q, k)


def _parts(length: int, blocks: BlockSizes) -> int:
    """Into how many parts the queries of a row are cut so that the tables of each fit."""
    parts, largest = 1, largest_block(blocks)
    while table_bytes(length // parts, length, blocks) > SCALAR_BYTES and length % (2 * parts * largest) == 0:
        parts *= 2
    return parts


def _kernel(q_places: Places, k_places: Places, blocks: BlockSizes, interpret: Any) -> SplashAttentionKernel:
    # The part's keys are the row's first.
    last_key_S = q_places.positions_BS[0]
    return SplashAttentionKernel(
        query_tables(q_places, k_places, last_key_S, blocks.block_q, blocks.block_kv),
        query_tables(q_places, k_places, last_key_S, blocks.block_q_dq, blocks.block_kv_dq),
        key_tables(q_places, k_places, last_key_S, blocks.block_q_dkv, blocks.block_kv_dkv),
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SOFTMAX_RESIDUALS,
        mask_function=not_behind,
        interpret=interpret,
    )
