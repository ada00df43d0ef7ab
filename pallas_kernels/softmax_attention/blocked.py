"""Causal softmax attention over pairs of blocks, in plain JAX: any backend, any length, no n x n matrix.

The forward pass takes one block of queries at a time and folds in the key blocks from the first that any of its
documents reaches to its own, with running maxima (online softmax). The backward pass recomputes the probabilities
from the log-sum-exp, one block of keys at a time. Packed rows cost the sum of their documents' squares, as far as
the documents of all rows in the batch allow a block to be skipped.

Shapes: B batch, S tokens, H query heads, G key-value heads, R = H / G, K key channels, V value channels, N blocks,
C tokens in a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.segments import document_positions, document_runs
from pallas_kernels.softmax_attention.pairs import (
    SOFTMAX_RESIDUALS,
    OnlineSoftmax,
    join_blocks,
    pair_gradients,
    pair_scores,
    split_blocks,
    split_query_blocks,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def softmax_attention_blocked(
    q_BSHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    segment_ids_BS: jax.Array | None,
    scale: float,
    block: int,
) -> jax.Array:
    """Softmax attention; ``op.py`` states the contract. ``block`` is the number of tokens in a block."""
    return _forward(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, block)[0]


class _Blocks(NamedTuple):
    """Operands cut into blocks, queries already scaled, and what each block of queries needs to look at."""

    q_NBGRCK: jax.Array
    k_NBGCK: jax.Array
    v_NBGCV: jax.Array
    runs_NBC: jax.Array | None
    first_N: jax.Array  # first key block that a query block can see


def _cut(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, block) -> _Blocks:
    (B, S), G = q_BSHK.shape[:2], k_BSGK.shape[2]
    q_BSHK = (q_BSHK * scale).astype(q_BSHK.dtype)
    N = -(-S // block)
    if segment_ids_BS is None:
        runs_NBC, first_N = None, jnp.zeros((N,), jnp.int32)
    else:
        # Tied to q: rematerialisation would compute what depends on the documents alone, the masks of all blocks, once
        # for both passes and keep it.
        q_BSHK, segment_ids_BS = lax.optimization_barrier((q_BSHK, segment_ids_BS))
        runs_BS = document_runs(segment_ids_BS)
        padded_BS = jnp.pad(runs_BS, ((0, 0), (0, N * block - S)), mode="edge")
        runs_NBC = padded_BS.reshape(B, N, block).swapaxes(0, 1)
        # Where the document of each query block's first token starts; the earliest row decides for the batch.
        start_BN = np.arange(N, dtype=np.int32) * block - document_positions(segment_ids_BS)[:, ::block]
        first_N = jnp.min(start_BN, axis=0) // block
    return _Blocks(
        split_query_blocks(q_BSHK, block, G),
        split_blocks(k_BSGK, block),
        split_blocks(v_BSGV, block),
        runs_NBC,
        first_N,
    )


def _scores(blocks: _Blocks, i, j, diagonal: bool) -> jax.Array:
    """Scores of query block i against key block j, fp32 [B, G, R, C, C], masked."""
    C = blocks.k_NBGCK.shape[-2]
    allowed = np.tril(np.ones((1, C, C), bool)) if diagonal else None
    if blocks.runs_NBC is not None:
        same = blocks.runs_NBC[i][:, :, None] == blocks.runs_NBC[j][:, None, :]
        allowed = same if allowed is None else same & allowed
    return pair_scores(blocks.q_NBGRCK[i], blocks.k_NBGCK[j], allowed)


def _forward(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, block):
    blocks = _cut(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, block)

    def one_query_block(i):
        fold = lambda j, seen: seen.fold(_scores(blocks, i, j, diagonal=False), blocks.v_NBGCV[j])  # noqa: E731
        seen = OnlineSoftmax.start(blocks.q_NBGRCK[i], v_BSGV.shape[-1])
        seen = seen.fold(_scores(blocks, i, i, diagonal=True), blocks.v_NBGCV[i])
        o, lse = lax.fori_loop(blocks.first_N[i], i, fold, seen).finish()
        return o.astype(v_BSGV.dtype), lse

    o_NBGRCV, lse_NBGRC = lax.map(one_query_block, jnp.arange(blocks.q_NBGRCK.shape[0], dtype=jnp.int32))
    o_BSHV = checkpoint_name(join_blocks(o_NBGRCV, q_BSHK.shape[1]), SOFTMAX_RESIDUALS)
    lse_NBGRC = checkpoint_name(lse_NBGRC, SOFTMAX_RESIDUALS)
    return o_BSHV, (q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, o_BSHV, lse_NBGRC)


def _backward(scale, block, residuals, do_BSHV):
    q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, o_BSHV, lse_NBGRC = residuals
    blocks = _cut(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, block)
    N, G = blocks.q_NBGRCK.shape[0], k_BSGK.shape[2]
    do_NBGRCV = split_query_blocks(do_BSHV, block, G)
    delta_BSH1 = jnp.sum(do_BSHV.astype(lse_NBGRC.dtype) * o_BSHV, axis=-1, keepdims=True)
    delta_NBGRC = split_query_blocks(delta_BSH1, block, G)[..., 0]

    def one_key_block(dq_NBGRCK, j):
        k_BGCK, v_BGCV = blocks.k_NBGCK[j], blocks.v_NBGCV[j]

        def fold(i, carry, diagonal=False):
            dq_NBGRCK, dk, dv = carry
            more = pair_gradients(
                _scores(blocks, i, j, diagonal),
                *(blocks.q_NBGRCK[i], k_BGCK, v_BGCV, do_NBGRCV[i], lse_NBGRC[i], delta_NBGRC[i]),
            )
            return dq_NBGRCK.at[i].add(more.dq_BGRCK), dk + more.dk_BGCK, dv + more.dv_BGCV

        zeros = [jnp.zeros(x.shape, lse_NBGRC.dtype) for x in (k_BGCK, v_BGCV)]
        carry = fold(j, (dq_NBGRCK, *zeros), diagonal=True)
        # Query blocks after j see it as long as their first block is not beyond it; first_N never decreases.
        end = jnp.sum(blocks.first_N <= j, dtype=jnp.int32)
        dq_NBGRCK, dk, dv = lax.fori_loop(j + 1, end, fold, carry)
        return dq_NBGRCK, (dk.astype(k_BSGK.dtype), dv.astype(v_BSGV.dtype))

    dq_NBGRCK = jnp.zeros(blocks.q_NBGRCK.shape, lse_NBGRC.dtype)
    dq_NBGRCK, (dk_NBGCK, dv_NBGCV) = lax.scan(one_key_block, dq_NBGRCK, jnp.arange(N, dtype=jnp.int32))
    S = q_BSHK.shape[1]
    dq_BSHK = (join_blocks(dq_NBGRCK, S) * scale).astype(q_BSHK.dtype)
    return dq_BSHK, join_blocks(dk_NBGCK, S), join_blocks(dv_NBGCV, S), None


softmax_attention_blocked.defvjp(_forward, _backward)
