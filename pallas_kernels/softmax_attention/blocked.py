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

from pallas_kernels.segments import document_positions, document_runs

# Finite, so that a difference of two masked scores is not a NaN; exp of it minus any real maximum is 0.
_MASKED = -1e30


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
    B, S, H, _ = q_BSHK.shape
    G = k_BSGK.shape[2]
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
        _split(q_BSHK, block).reshape(N, B, G, H // G, block, -1),
        _split(k_BSGK, block),
        _split(v_BSGV, block),
        runs_NBC,
        first_N,
    )


def _split(x_BSHD: jax.Array, block: int) -> jax.Array:
    """[B, S, H, D] to [N, B, H, C, D], padded with zeros (no real query comes after the padding)."""
    B, S, H, D = x_BSHD.shape
    N = -(-S // block)
    x_BSHD = jnp.pad(x_BSHD, ((0, 0), (0, N * block - S), (0, 0), (0, 0)))
    return x_BSHD.reshape(B, N, block, H, D).transpose(1, 0, 3, 2, 4)


def _join(x_NBHCD: jax.Array, length: int) -> jax.Array:
    """The inverse of ``_split``; leading dimensions between B and C are merged into heads."""
    N, B, *heads, C, D = x_NBHCD.shape
    H = int(np.prod(heads))
    return x_NBHCD.reshape(N, B, H, C, D).transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, D)[:, :length]


def _scores(blocks: _Blocks, i, j, diagonal: bool) -> jax.Array:
    """Scores of query block i against key block j, fp32 [B, G, R, C, C], masked."""
    scores = _dot("bgrik,bgjk->bgrij", blocks.q_NBGRCK[i], blocks.k_NBGCK[j])
    C = scores.shape[-1]
    allowed = np.tril(np.ones((1, C, C), bool)) if diagonal else None
    if blocks.runs_NBC is not None:
        same = blocks.runs_NBC[i][:, :, None] == blocks.runs_NBC[j][:, None, :]
        allowed = same if allowed is None else same & allowed
    return scores if allowed is None else jnp.where(allowed[:, None, None], scores, _MASKED)


def _forward(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, block):
    blocks = _cut(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, block)

    def one_query_block(i):
        # The diagonal comes first: every query sees itself there, so the running maximum is real from the start.
        scores = _scores(blocks, i, i, diagonal=True)
        top = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - top[..., None])
        total = jnp.sum(weights, axis=-1)
        o = _dot("bgrij,bgjv->bgriv", weights.astype(v_BSGV.dtype), blocks.v_NBGCV[i])

        def fold(j, carry):
            o, top, total = carry
            scores = _scores(blocks, i, j, diagonal=False)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            shrink = jnp.exp(top - new_top)
            weights = jnp.exp(scores - new_top[..., None])
            part = _dot("bgrij,bgjv->bgriv", weights.astype(v_BSGV.dtype), blocks.v_NBGCV[j])
            return o * shrink[..., None] + part, new_top, total * shrink + jnp.sum(weights, axis=-1)

        o, top, total = lax.fori_loop(blocks.first_N[i], i, fold, (o, top, total))
        return (o / total[..., None]).astype(v_BSGV.dtype), top + jnp.log(total)

    o_NBGRCV, lse_NBGRC = lax.map(one_query_block, jnp.arange(blocks.q_NBGRCK.shape[0], dtype=jnp.int32))
    o_BSHV = _join(o_NBGRCV, q_BSHK.shape[1])
    return o_BSHV, (q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, o_BSHV, lse_NBGRC)


def _backward(scale, block, residuals, do_BSHV):
    q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, o_BSHV, lse_NBGRC = residuals
    blocks = _cut(q_BSHK, k_BSGK, v_BSGV, segment_ids_BS, scale, block)
    N, B, G, R, C, _ = blocks.q_NBGRCK.shape
    do_NBGRCV = _split(do_BSHV, block).reshape(N, B, G, R, C, -1)
    delta_BSH1 = jnp.sum(do_BSHV.astype(lse_NBGRC.dtype) * o_BSHV, axis=-1, keepdims=True)
    delta_NBGRC = _split(delta_BSH1, block).reshape(N, B, G, R, C)

    def one_key_block(dq_NBGRCK, j):
        k_BGCK, v_BGCV = blocks.k_NBGCK[j], blocks.v_NBGCV[j]

        def fold(i, carry, diagonal=False):
            dq_NBGRCK, dk, dv = carry
            do = do_NBGRCV[i]
            weights = jnp.exp(_scores(blocks, i, j, diagonal) - lse_NBGRC[i][..., None])
            dweights = _dot("bgriv,bgjv->bgrij", do, v_BGCV)
            dscores = (weights * (dweights - delta_NBGRC[i][..., None])).astype(q_BSHK.dtype)
            dv += _dot("bgrij,bgriv->bgjv", weights.astype(do.dtype), do)
            dk += _dot("bgrij,bgrik->bgjk", dscores, blocks.q_NBGRCK[i])
            dq = _dot("bgrij,bgjk->bgrik", dscores, k_BGCK)
            return dq_NBGRCK.at[i].add(dq), dk, dv

        zeros = [jnp.zeros(x.shape, lse_NBGRC.dtype) for x in (k_BGCK, v_BGCV)]
        carry = fold(j, (dq_NBGRCK, *zeros), diagonal=True)
        # Query blocks after j see it as long as their first block is not beyond it; first_N never decreases.
        end = jnp.sum(blocks.first_N <= j, dtype=jnp.int32)
        dq_NBGRCK, dk, dv = lax.fori_loop(j + 1, end, fold, carry)
        return dq_NBGRCK, (dk.astype(k_BSGK.dtype), dv.astype(v_BSGV.dtype))

    dq_NBGRCK = jnp.zeros(blocks.q_NBGRCK.shape, lse_NBGRC.dtype)
    dq_NBGRCK, (dk_NBGCK, dv_NBGCV) = lax.scan(one_key_block, dq_NBGRCK, jnp.arange(N, dtype=jnp.int32))
    S = q_BSHK.shape[1]
    dq_BSHK = (_join(dq_NBGRCK, S) * scale).astype(q_BSHK.dtype)
    return dq_BSHK, _join(dk_NBGCK, S), _join(dv_NBGCV, S), None


softmax_attention_blocked.defvjp(_forward, _backward)


def _dot(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix product accumulated in fp32, or wider for wider operands."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.promote_types(jnp.float32, left.dtype))
