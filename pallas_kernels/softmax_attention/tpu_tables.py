"""The small tables that splash attention's kernels read: which pairs of blocks to compute, and what to fetch next.

jax makes them on the host from a mask, element by element, which takes minutes for a million tokens and cannot know the
documents. Here they are computed on the device from where tokens lie, so that tracing costs nothing, and packed rows
cost the sum of their documents' squares.

The kernels mask by comparing a number of each query with the index of each key. Wherever keys lie in the row, the
number is the index of the last key that is not behind the query.

Shapes: B = 1 row, S queries, T keys, N blocks of queries, M blocks of keys.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pallas_kernels.softmax_attention.part import Places, block_ranges

# What the tables of one call may take of the 1 MiB of scalar memory, and what a pair of blocks takes of it.
SCALAR_BYTES = 3 * 2**18
TABLE_BYTES = 3


def query_tables(q_places: Places, k_places: Places, last_key_S: jax.Array, q_block: int, k_block: int) -> MaskInfo:
    """For a kernel that takes the queries' blocks one after the other, and for each the keys' blocks that it sees.

    Args:
      q_places, k_places: of one row, in whole blocks.
      last_key_S: index of the last key that is not behind a query, -1 for none; int32.
    """
    first_N, end_N, (_, j_NM), visible_NM = _pairs(q_places, k_places, q_block, k_block)
    M = visible_NM.shape[1]
    # Behind the last one, fetch the next query block's first.
    following_N = jnp.roll(first_N, -1)
    fetch_NM = jnp.where(j_NM < end_N[:, None], jnp.maximum(j_NM, first_N[:, None]), following_N[:, None])
    # The first one of a query behind all documents of these keys would be beyond them.
    return _tables(last_key_S, jnp.minimum(fetch_NM, M - 1), visible_NM, M)


def key_tables(q_places: Places, k_places: Places, last_key_S: jax.Array, q_block: int, k_block: int) -> MaskInfo:
    """For a kernel that takes the keys' blocks one after the other, and for each the queries' blocks that see it."""
    first_N, end_N, (i_NM, j_NM), visible_NM = _pairs(q_places, k_places, q_block, k_block)
    N = visible_NM.shape[0]
    # Neither first nor end ever falls, so the blocks that see one are neighbours. Behind the last, fetch the first for
    # the next head; for a block that nobody sees, anything.
    first_M, end_M = jnp.sum(end_N[:, None] <= j_NM, axis=0), jnp.sum(first_N[:, None] <= j_NM, axis=0)
    first_M = jnp.minimum(first_M, N - 1)
    fetch_NM = jnp.where(i_NM < end_M, jnp.maximum(i_NM, first_M), first_M)
    return _tables(last_key_S, fetch_NM, visible_NM, N)


def not_behind(last_key: jax.Array, key: jax.Array) -> jax.Array:
    """The mask that the kernels compute: which keys a query may see by the order of the row."""
    return last_key >= key


def table_bytes(queries: int, keys: int, blocks: BlockSizes) -> int:
    """Scalar memory that the largest table takes of a call with so many queries and keys."""
    return max(-(-queries // q) * -(-keys // k) * TABLE_BYTES for q, k in _block_pairs(blocks))


def largest_block(blocks: BlockSizes) -> int:
    """What rows are padded to a multiple of: sizes are powers of two."""
    return max(map(max, _block_pairs(blocks)))


def _block_pairs(blocks: BlockSizes) -> tuple[tuple[int, int], ...]:
    """Of the forward kernel and those of the gradients."""
    forward, keys = (blocks.block_q, blocks.block_kv), (blocks.block_q_dkv, blocks.block_kv_dkv)
    queries = () if blocks.use_fused_bwd_kernel else ((blocks.block_q_dq, blocks.block_kv_dq),)
    return forward, *queries, keys


def _pairs(q_places: Places, k_places: Places, q_block: int, k_block: int):
    (first_N,), (end_N,) = block_ranges(q_places, k_places, q_block, k_block)
    M = k_places.positions_BS.shape[1] // k_block
    i_NM, j_NM = (lax.broadcasted_iota(jnp.int32, (first_N.size, M), axis) for axis in (0, 1))
    return first_N, end_N, (i_NM, j_NM), (first_N[:, None] <= j_NM) & (j_NM < end_N[:, None])


def _tables(last_key_S: jax.Array, fetch_NM: jax.Array, visible_NM: jax.Array, count: int) -> MaskInfo:
    # They lie in scalar memory, which is small.
    index = jnp.int8 if count <= 128 else jnp.int16
    return MaskInfo(
        data_next=fetch_NM.astype(index)[None],
        mask_next=None,
        block_mask=visible_NM.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=last_key_S,
    )
