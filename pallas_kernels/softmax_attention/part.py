"""Softmax attention of some tokens of a row to some others of its keys, in plain JAX: a piece of ring attention.

The tokens say where in the row they lie and to which document they belong; a query sees the keys that are not behind
it in the row and belong to its document. Results of several parts are joined by their log-sum-exps. Pairs of blocks
that the order of the row or the documents exclude are not computed, as far as the rows of the batch agree.

Shapes: B batch (1 where all rows are alike), S queries, T keys, H query heads, G key-value heads, R = H / G, K key
channels, V value channels, N blocks of queries, M blocks of keys, C tokens in a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.softmax_attention.pairs import (
    OnlineSoftmax,
    accumulation_dtype,
    join_blocks,
    pair_gradients,
    pair_scores,
    split_blocks,
    split_query_blocks,
)

# Where padded keys lie: behind every query.
NOWHERE = np.iinfo(np.int32).max


class Places(NamedTuple):
    """Where tokens lie in their row. Both rise along S, the positions strictly; NumPy and JAX arrays alike."""

    positions_BS: jax.Array | np.ndarray  # in the whole row, int32
    runs_BS: jax.Array | np.ndarray | None  # number of the document in the row, int32; None if all are one

    def cut(self, tokens: slice | np.ndarray) -> "Places":
        """Those of some of the tokens."""
        return Places(*(None if x is None else x[:, tokens] for x in self))

    def edges(self, block: int) -> tuple["Places", "Places"]:
        """The first and the last token of each block."""
        length = self.positions_BS.shape[1]
        first = np.arange(0, length, block)
        return self.cut(first), self.cut(np.minimum(first + block, length) - 1)


def attention_part(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    q_places: Places,
    k_places: Places,
    scale: float,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Attention to these keys alone.

    Args:
      q_BSHK, k_BTGK, v_BTGV: one floating dtype; H is a multiple of G.
      q_places, k_places: of the queries and of the keys.
      scale: of the scores.
      block: tokens in a block.

    Returns:
      o [B, S, H, V] and the log-sum-exp of the scores [B, S, H], fp32 (float64 for float64 inputs); 0 and hugely
      negative for queries that see none of the keys.
    """
    cut = _Cut.of(q_BSHK, k_BTGK, v_BTGV, q_places, k_places, scale, block)

    def one_query_block(i):
        fold = lambda j, seen: seen.fold(cut.scores(i, j), cut.v_MBGCV[j])  # noqa: E731
        start = OnlineSoftmax.start(cut.q_NBGRCK[i], v_BTGV.shape[-1])
        o, lse = lax.fori_loop(cut.first_N[i], cut.end_N[i], fold, start).finish()
        return o, lse[..., None]

    o_NBGRCV, lse_NBGRC1 = lax.map(one_query_block, jnp.arange(cut.q_NBGRCK.shape[0], dtype=jnp.int32))
    S = q_BSHK.shape[1]
    return join_blocks(o_NBGRCV, S), join_blocks(lse_NBGRC1, S)[..., 0]


def attention_part_gradients(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    q_places: Places,
    k_places: Places,
    scale: float,
    block: int,
    do_BSHV: jax.Array,
    lse_BSH: jax.Array,
    delta_BSH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys contribute to the gradients of attention to all keys.

    Args:
      do_BSHV: cotangent of the output.
      lse_BSH: log-sum-exp of the scores over all keys.
      delta_BSH: sum of do * o over channels.

    Returns:
      dq [B, S, H, K], dk [B, T, G, K], dv [B, T, G, V], fp32 (float64 for float64 inputs).
    """
    cut = _Cut.of(q_BSHK, k_BTGK, v_BTGV, q_places, k_places, scale, block)
    G = k_BTGK.shape[2]
    do_NBGRCV = split_query_blocks(do_BSHV, block, G)
    lse_NBGRC, delta_NBGRC = (split_query_blocks(x[..., None], block, G)[..., 0] for x in (lse_BSH, delta_BSH))
    dtype = accumulation_dtype(q_BSHK)

    # Queries outside, keys inside: the sums that go through memory are those of the fewer heads.
    def one_query_block(carry, i):
        def fold(j, carry):
            dq, dk, dv = carry
            more = pair_gradients(
                cut.scores(i, j),
                *(cut.q_NBGRCK[i], cut.k_MBGCK[j], cut.v_MBGCV[j], do_NBGRCV[i], lse_NBGRC[i], delta_NBGRC[i]),
            )
            return dq + more.dq_BGRCK, dk.at[j].add(more.dk_BGCK), dv.at[j].add(more.dv_BGCV)

        dq = jnp.zeros(cut.q_NBGRCK.shape[1:], dtype)
        dq, *carry = lax.fori_loop(cut.first_N[i], cut.end_N[i], fold, (dq, *carry))
        return tuple(carry), dq

    zeros = jnp.zeros(cut.k_MBGCK.shape, dtype), jnp.zeros(cut.v_MBGCV.shape, dtype)
    steps = jnp.arange(cut.q_NBGRCK.shape[0], dtype=jnp.int32)
    (dk_MBGCK, dv_MBGCV), dq_NBGRCK = lax.scan(one_query_block, zeros, steps)
    T = k_BTGK.shape[1]
    return join_blocks(dq_NBGRCK, q_BSHK.shape[1]) * scale, join_blocks(dk_MBGCK, T), join_blocks(dv_MBGCV, T)


def visible_blocks(
    q_places: Places, k_places: Places, block: int, k_block: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Which blocks of keys each block of queries has to look at: from the first up to, not including, the end.

    Args:
      block: tokens in a block of queries, and of keys where ``k_block`` is None.
      k_block: tokens in a block of keys.

    Returns:
      first [N] and end [N]; nothing where first is not below end. NumPy arrays for NumPy places.
    """
    first_BN, end_BN = block_ranges(q_places, k_places, block, k_block or block)
    if q_places.runs_BS is None:
        return first_BN.min(0), end_BN.max(0)
    # Rows that look at nothing do not widen the range of the others.
    idle_BN = first_BN >= end_BN
    M = -(-k_places.positions_BS.shape[1] // (k_block or block))
    return (first_BN + idle_BN * M).min(0), (end_BN * ~idle_BN).max(0)


def block_ranges(q_places: Places, k_places: Places, q_block: int, k_block: int) -> tuple[jax.Array, jax.Array]:
    """``visible_blocks`` of each row, [B, N] each: neither first nor end ever falls along N."""
    (q_first, q_last), (k_first, k_last) = q_places.edges(q_block), k_places.edges(k_block)
    end_BN = (k_first.positions_BS[:, None] <= q_last.positions_BS[..., None]).sum(-1)
    if q_places.runs_BS is None:
        return 0 * end_BN, end_BN
    return (k_last.runs_BS[:, None] < q_first.runs_BS[..., None]).sum(-1), end_BN


class _Cut(NamedTuple):
    """Operands in blocks, queries already scaled."""

    q_NBGRCK: jax.Array
    k_MBGCK: jax.Array
    v_MBGCV: jax.Array
    q_places: Places  # [N, B, C]
    k_places: Places  # [M, B, C]
    first_N: jax.Array
    end_N: jax.Array

    @classmethod
    def of(cls, q_BSHK, k_BTGK, v_BTGV, q_places: Places, k_places: Places, scale: float, block: int) -> "_Cut":
        # Tied to q: rematerialisation would compute what depends on the documents alone, the masks of all blocks, once
        # for both passes and keep it.
        q_BSHK, q_places, k_places = lax.optimization_barrier((q_BSHK, q_places, k_places))
        q_BSHK = (q_BSHK * scale).astype(q_BSHK.dtype)
        first_N, end_N = visible_blocks(q_places, k_places, block)
        return cls(
            split_query_blocks(q_BSHK, block, k_BTGK.shape[2]),
            split_blocks(k_BTGK, block),
            split_blocks(v_BTGV, block),
            _cut_places(q_places, block),
            _cut_places(k_places, block),
            first_N.astype(jnp.int32),
            end_N.astype(jnp.int32),
        )

    def scores(self, i, j) -> jax.Array:
        """Scores of query block i against key block j, masked."""
        allowed_BCC = self.k_places.positions_BS[j][:, None] <= self.q_places.positions_BS[i][..., None]
        if self.q_places.runs_BS is not None:
            allowed_BCC &= self.k_places.runs_BS[j][:, None] == self.q_places.runs_BS[i][..., None]
        return pair_scores(self.q_NBGRCK[i], self.k_MBGCK[j], allowed_BCC)


def _cut_places(places: Places, block: int) -> Places:
    def cut(x_BS, value):
        if x_BS is None:
            return None
        B, S = x_BS.shape
        N = -(-S // block)
        x_BS = jnp.pad(x_BS, ((0, 0), (0, N * block - S)), constant_values=value)
        return x_BS.reshape(B, N, block).swapaxes(0, 1)

    return Places(cut(places.positions_BS, NOWHERE), cut(places.runs_BS, 0))
