"""Causal softmax attention on TPU: jax's splash attention kernels, told which pairs of blocks the documents leave.

The kernels read small tables: which pairs of blocks to compute, and which block to fetch next. jax makes them on the
host from a mask, element by element, which takes minutes for a million tokens and cannot know the documents. Here they
are computed on the device from where documents begin, so that tracing costs nothing, and packed rows cost the sum of
their documents' squares. Key-value heads are not repeated: the kernel maps a group of query heads to theirs.

Shapes: B batch, S tokens, H query heads, G key-value heads, K key channels, V value channels, N blocks of queries, M
blocks of keys.
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
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pallas_kernels.segments import document_runs
from pallas_kernels.softmax_attention.part import Places, visible_blocks

# Name of the output and the log-sum-exp inside. A rematerialisation policy that keeps them saves the backward pass a
# second forward pass.
SOFTMAX_RESIDUALS = "softmax_residuals"

LANES = 128
_CHANNELS = (64, 128, 256)
_MOST_TOKENS = 2**20
# What the tables of one call may take of the 1 MiB of scalar memory, and what a pair of blocks takes of it.
_SCALAR_BYTES = 3 * 2**18
_TABLE_BYTES = 3


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
    padding = -S % max(blocks.block_q, blocks.block_kv)
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
    pairs = ((blocks.block_q, blocks.block_kv), (blocks.block_q_dq, blocks.block_kv_dq))
    pairs += ((blocks.block_q_dkv, blocks.block_kv_dkv),)
    size = max((length // q) * (length // k) * _TABLE_BYTES for q, k in pairs)
    parts = 1
    while size // parts > _SCALAR_BYTES and length % (2 * parts * max(map(max, pairs))) == 0:
        parts *= 2
    return parts


def _kernel(q_places: Places, k_places: Places, blocks: BlockSizes, interpret: Any) -> SplashAttentionKernel:
    return SplashAttentionKernel(
        _query_tables(q_places, k_places, blocks.block_q, blocks.block_kv),
        _query_tables(q_places, k_places, blocks.block_q_dq, blocks.block_kv_dq),
        _key_tables(q_places, k_places, blocks.block_q_dkv, blocks.block_kv_dkv),
        block_sizes=blocks,
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SOFTMAX_RESIDUALS,
        mask_function=_not_behind,
        interpret=interpret,
    )


def _not_behind(q_position: jax.Array, k_position: jax.Array) -> jax.Array:
    return q_position >= k_position


def _query_tables(q_places: Places, k_places: Places, q_block: int, k_block: int) -> MaskInfo:
    """For a kernel that takes the queries' blocks one after the other, and for each the keys' blocks that it sees."""
    first_N, end_N = visible_blocks(q_places, k_places, q_block, k_block)
    M = k_places.positions_BS.shape[1] // k_block
    j_NM = lax.broadcasted_iota(jnp.int32, (first_N.size, M), 1)
    visible_NM = (first_N[:, None] <= j_NM) & (j_NM < end_N[:, None])
    # Behind the last one, fetch the next query block's first.
    following_N = jnp.roll(first_N, -1)
    fetch_NM = jnp.where(j_NM < end_N[:, None], jnp.maximum(j_NM, first_N[:, None]), following_N[:, None])
    return _tables(q_places, fetch_NM, visible_NM, M)


def _key_tables(q_places: Places, k_places: Places, q_block: int, k_block: int) -> MaskInfo:
    """For a kernel that takes the keys' blocks one after the other, and for each the queries' blocks that see it."""
    first_N, end_N = visible_blocks(q_places, k_places, q_block, k_block)
    N, M = first_N.size, k_places.positions_BS.shape[1] // k_block
    i_NM, j_NM = (lax.broadcasted_iota(jnp.int32, (N, M), axis) for axis in (0, 1))
    visible_NM = (first_N[:, None] <= j_NM) & (j_NM < end_N[:, None])
    # Neither first nor end ever falls, so the blocks that see one are neighbours. Behind the last, fetch the first for
    # the next head; for a block that nobody sees, anything.
    first_M, end_M = jnp.sum(end_N[:, None] <= j_NM, axis=0), jnp.sum(first_N[:, None] <= j_NM, axis=0)
    first_M = jnp.minimum(first_M, N - 1)
    fetch_NM = jnp.where(i_NM < end_M, jnp.maximum(i_NM, first_M), first_M)
    return _tables(q_places, fetch_NM, visible_NM, N)


def _tables(q_places: Places, fetch_NM: jax.Array, visible_NM: jax.Array, count: int) -> MaskInfo:
    # They lie in scalar memory, which is small.
    index = jnp.int8 if count <= 128 else jnp.int16
    return MaskInfo(
        data_next=fetch_NM.astype(index)[None],
        mask_next=None,
        block_mask=visible_NM.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=q_places.positions_BS[0],
    )
