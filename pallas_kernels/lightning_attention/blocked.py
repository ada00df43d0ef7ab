"""Lightning attention over blocks, in plain JAX: any backend, any length, memory that grows with n, exact gradients.

A row is cut into blocks of C tokens and the blocks into groups of G. Inside a group everything is a batched matrix
product: scores within each block, one K x V summary U_a of each block, and the state that enters block b as a weighted
sum of the summaries before it. Only the scan over groups is sequential, and it carries one state. The backward pass
keeps the states that enter the groups, O(n / (C G)) of them, recomputes the rest, and runs the scan in reverse.

Every decay factor is exp of a difference that is <= 0, with the mask applied to the exponent's sign before exp, so no
factor exceeds 1 and nothing overflows at any slope, block or length. Documents are honoured through ``run`` numbers:
two tokens interact only if their runs are equal, and a state carries the run of its last token.

Shapes: B batch, S tokens, H heads, K key channels, V value channels, N groups, G blocks in a group (a and b index
them), C tokens in a block (i and j index them). A batch dimension of 1 in a weight means: the same for all rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.segments import document_runs


class _Weights(NamedTuple):
    """Decay factors of one group, zero where a document boundary or the causal order separates the two ends."""

    intra_BHGCC: jax.Array  # token j of a block to token i of the same block
    query_BHGC: jax.Array  # state entering the block to its token i
    key_BHGC: jax.Array  # token j to the end of its block
    link_BHGG: jax.Array  # summary of block a to the state entering block b
    carry_BHG: jax.Array  # state entering the group to the state entering block b
    out_BHG: jax.Array  # summary of block a to the state leaving the group
    through_BH: jax.Array  # state entering the group to the state leaving it


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def lightning_attention_blocked(
    q_BSHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    slopes_H: jax.Array,
    segment_ids_BS: jax.Array | None,
    initial_state_BHKV: jax.Array,
    block: int,
    group: int,
) -> tuple[jax.Array, jax.Array]:
    """Lightning attention; ``op.py`` states the contract.

    Args:
      initial_state_BHKV: its dtype, fp32 or wider, is that of the decays, the accumulation and the final state.
      block: tokens in a block.
      group: most blocks that are worked on at once.
    """
    outputs, _ = _forward(q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, initial_state_BHKV, block, group)
    return outputs


def _forward(q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, initial_state_BHKV, block, group):
    _, S, H, _ = q_BSHK.shape
    tiling = _Tiling.of(S, block, group)
    runs_BS = None if segment_ids_BS is None else document_runs(segment_ids_BS)
    first_run_B = None if runs_BS is None else runs_BS[:, 0]
    operands = [tiling.pad(x) for x in (q_BSHK, k_BSHK, v_BSHV)]

    def step(carry, inputs):
        state_BHKV, run_B, o_BSF = carry
        n, run_BGC, length = inputs
        q_BHGCK, k_BHGCK, v_BHGCV = (tiling.take(x, n, H) for x in operands)
        weights, last_run_B = _weights(slopes_H, length, run_BGC, run_B, tiling, state_BHKV.dtype)
        entering_BHGKV, leaving_BHKV = _states(k_BHGCK, v_BHGCV, weights, state_BHKV)
        scores = _dot("bhgik,bhgjk->bhgij", q_BHGCK, k_BHGCK, weights) * weights.intra_BHGCC
        o_BHGCV = _dot("bhgij,bhgjv->bhgiv", scores.astype(v_BHGCV.dtype), v_BHGCV, weights)
        q_BHGCK = _scale(q_BHGCK, weights.query_BHGC)
        o_BHGCV += _dot("bhgik,bhgkv->bhgiv", q_BHGCK, entering_BHGKV.astype(q_BHGCK.dtype), weights)
        return (leaving_BHKV, last_run_B, tiling.put(o_BSF, o_BHGCV, n)), state_BHKV

    inputs = (tiling.index_N, tiling.split_runs(runs_BS), tiling.lengths_N)
    carry = (initial_state_BHKV, first_run_B, jnp.zeros_like(operands[2]))
    (final_BHKV, _, o_BSF), states_NBHKV = lax.scan(step, carry, inputs)
    return (tiling.cut(o_BSF, H), final_BHKV), (q_BSHK, k_BSHK, v_BSHV, slopes_H, runs_BS, states_NBHKV)


def _backward(block, group, residuals, cotangents):
    q_BSHK, k_BSHK, v_BSHV, slopes_H, runs_BS, states_NBHKV = residuals
    do_BSHV, dfinal_BHKV = cotangents
    _, S, H, _ = q_BSHK.shape
    tiling = _Tiling.of(S, block, group)
    runs_NBGC = tiling.split_runs(runs_BS)
    # The run that each group's entering state belongs to: that of the last token before the group.
    entering_runs_NB = None
    if runs_BS is not None:
        entering_runs_NB = jnp.concatenate([runs_BS[None, :, 0], runs_NBGC[:-1, :, -1, -1]])

    operands = [tiling.pad(x) for x in (q_BSHK, k_BSHK, v_BSHV, do_BSHV)]

    def step(carry, inputs):
        dstate_BHKV, *grads = carry
        n, run_BGC, run_B, length, state_BHKV = inputs
        q, k, v, do = (tiling.take(x, n, H) for x in operands)
        w, _ = _weights(slopes_H, length, run_BGC, run_B, tiling, state_BHKV.dtype)
        entering_BHGKV, _ = _states(k, v, w, state_BHKV)
        q_scaled, k_scaled = _scale(q, w.query_BHGC), _scale(k, w.key_BHGC)

        # Cotangents of the states that enter the blocks, of the summaries, and of the state that enters the group.
        dentering = _dot("bhgik,bhgiv->bhgkv", q_scaled, do, w)
        dsummary = _mix(jnp.swapaxes(w.link_BHGG, -1, -2), dentering)
        dsummary += w.out_BHG[..., None, None] * dstate_BHKV[:, :, None]
        dstate_BHKV = w.through_BH[..., None, None] * dstate_BHKV
        dstate_BHKV += jnp.sum(w.carry_BHG[..., None, None] * dentering, axis=2)

        dscores = _dot("bhgiv,bhgjv->bhgij", do, v, w) * w.intra_BHGCC
        scores = _dot("bhgik,bhgjk->bhgij", q, k, w) * w.intra_BHGCC
        dscores, scores = dscores.astype(q.dtype), scores.astype(v.dtype)
        entering, dsummary = entering_BHGKV.astype(q.dtype), dsummary.astype(q.dtype)
        dq = _dot("bhgij,bhgjk->bhgik", dscores, k, w)
        dq += w.query_BHGC[..., None] * _dot("bhgiv,bhgkv->bhgik", do, entering, w)
        dk = _dot("bhgij,bhgik->bhgjk", dscores, q, w)
        dk += w.key_BHGC[..., None] * _dot("bhgjv,bhgkv->bhgjk", v, dsummary, w)
        dv = _dot("bhgij,bhgiv->bhgjv", scores, do, w)
        dv += _dot("bhgjk,bhgkv->bhgjv", k_scaled, dsummary, w)
        grads = (tiling.put(*pair, n) for pair in zip(grads, (dq, dk, dv), strict=True))
        return (dstate_BHKV, *grads), None

    inputs = (tiling.index_N, runs_NBGC, entering_runs_NB, tiling.lengths_N, states_NBHKV)
    carry = (dfinal_BHKV, *(jnp.zeros_like(x) for x in operands[:3]))
    (dinitial_BHKV, *grads), _ = lax.scan(step, carry, inputs, reverse=True)
    dq_BSHK, dk_BSHK, dv_BSHV = (tiling.cut(x, H) for x in grads)
    # Slopes are constants of the architecture: no gradient. Segment ids are integers.
    return dq_BSHK, dk_BSHK, dv_BSHV, jnp.zeros_like(slopes_H), None, dinitial_BHKV


lightning_attention_blocked.defvjp(_forward, _backward)


class _Tiling(NamedTuple):
    """How a row of ``length`` tokens is cut; the tail of the last group is padding."""

    length: int
    groups: int  # N
    blocks: int  # G
    block: int  # C

    @classmethod
    def of(cls, length: int, block: int, group: int) -> "_Tiling":
        block = min(block, length)
        blocks = -(-length // block)
        groups = -(-blocks // group)
        # Spread the blocks evenly over the groups: at most groups - 1 blocks are padding.
        return cls(length, groups, -(-blocks // groups), block)

    @property
    def lengths_N(self) -> np.ndarray:
        """Real tokens in each group."""
        per_group = self.blocks * self.block
        return np.clip(self.length - per_group * np.arange(self.groups), 0, per_group).astype(np.int32)

    @property
    def index_N(self) -> np.ndarray:
        """The groups' numbers."""
        return np.arange(self.groups, dtype=np.int32)

    def pad(self, x_BSHD: jax.Array) -> jax.Array:
        """Zeros behind the last token, up to whole groups; heads and channels merged, [B, padded S, H D].

        Merged, they leave XLA no choice of layout: with heads apart it would reorder whole operands before the loop
        over groups, a second copy of each.
        """
        B, S, H, D = x_BSHD.shape
        padding = self.groups * self.blocks * self.block - self.length
        return jnp.pad(x_BSHD.reshape(B, S, H * D), ((0, 0), (0, padding), (0, 0)))

    def cut(self, x_BSF: jax.Array, heads: int) -> jax.Array:
        """The inverse of ``pad``."""
        return x_BSF[:, : self.length].reshape(x_BSF.shape[0], self.length, heads, -1)

    def take(self, x_BSF: jax.Array, n: jax.Array, heads: int) -> jax.Array:
        """Group n of padded tokens, [B, H, G, C, D]."""
        G, C = self.blocks, self.block
        group_BSF = lax.dynamic_slice_in_dim(x_BSF, n * (G * C), G * C, axis=1)
        return group_BSF.reshape(x_BSF.shape[0], G, C, heads, -1).transpose(0, 3, 1, 2, 4)

    def put(self, x_BSF: jax.Array, group_BHGCD: jax.Array, n: jax.Array) -> jax.Array:
        """Padded tokens with group n replaced."""
        B, _, G, C, _ = group_BHGCD.shape
        group_BSF = group_BHGCD.transpose(0, 2, 3, 1, 4).reshape(B, G * C, -1)
        return lax.dynamic_update_slice_in_dim(x_BSF, group_BSF.astype(x_BSF.dtype), n * (G * C), axis=1)

    def split_runs(self, runs_BS: jax.Array | None) -> jax.Array | None:
        """[B, S] to [N, B, G, C]; padding continues the last document, so that it ends no run."""
        if runs_BS is None:
            return None
        B, S = runs_BS.shape
        N, G, C = self.groups, self.blocks, self.block
        return jnp.pad(runs_BS, ((0, 0), (0, N * G * C - S)), mode="edge").reshape(B, N, G, C).swapaxes(0, 1)


def _weights(slopes_H, length, run_BGC, run_B, tiling, dtype) -> tuple[_Weights, jax.Array | None]:
    """Decay factors of a group with ``length`` real tokens, entered by a state of run ``run_B``."""
    G, C = tiling.blocks, tiling.block
    slopes_H = slopes_H.astype(dtype)
    i, g = np.arange(C), np.arange(G)
    start_G, end_G = jnp.minimum(g * C, length), jnp.minimum((g + 1) * C, length)
    position_GC = g[:, None] * C + i

    def decay(distance, allowed=True):
        """exp(-slope * distance) with heads in front, 0 where not allowed or where the distance is negative."""
        exponent = -slopes_H.reshape(-1, *[1] * np.ndim(distance)) * jnp.maximum(distance, 0).astype(dtype)
        return jnp.where((distance >= 0) & allowed, jnp.exp(exponent), 0)

    intra_HCC = decay(i[:, None] - i)
    query_HC = decay(i + 1)
    key_HGC = decay(end_G[:, None] - 1 - position_GC)
    link_HGG = decay(start_G[:, None] - end_G, g[:, None] > g)
    carry_HG = decay(start_G)
    out_HG = decay(length - end_G)
    through_H = decay(length)
    if run_BGC is None:
        return _Weights(
            intra_HCC[None, :, None],
            query_HC[None, :, None],
            *(x[None] for x in (key_HGC, link_HGG, carry_HG, out_HG, through_H)),
        ), None

    end_run_BG = run_BGC[:, :, -1]
    last_run_B = end_run_BG[:, -1]
    entering_run_BG = jnp.concatenate([run_B[:, None], end_run_BG[:, :-1]], axis=1)

    def keep(weight_H, left_B, right_B):
        """The weight where both runs are equal; heads go behind the batch."""
        return jnp.where((left_B == right_B)[:, None], weight_H, 0)

    return _Weights(
        keep(intra_HCC[:, None], run_BGC[..., :, None], run_BGC[..., None, :]),
        keep(query_HC[:, None], run_BGC, entering_run_BG[..., None]),
        keep(key_HGC, run_BGC, end_run_BG[..., None]),
        keep(link_HGG, entering_run_BG[:, :, None], end_run_BG[:, None, :]),
        keep(carry_HG, entering_run_BG, run_B[:, None]),
        keep(out_HG, end_run_BG, last_run_B[:, None]),
        keep(through_H, run_B, last_run_B),
    ), last_run_B


def _states(k_BHGCK, v_BHGCV, weights: _Weights, state_BHKV):
    """States that enter the blocks of a group, [B, H, G, K, V], and the state that leaves it, [B, H, K, V]."""
    summary = _dot("bhgjk,bhgjv->bhgkv", _scale(k_BHGCK, weights.key_BHGC), v_BHGCV, weights)
    entering = _mix(weights.link_BHGG, summary)
    entering += weights.carry_BHG[..., None, None] * state_BHKV[:, :, None]
    leaving = jnp.sum(weights.out_BHG[..., None, None] * summary, axis=2)
    return entering, leaving + weights.through_BH[..., None, None] * state_BHKV


def _mix(link_BHGG: jax.Array, states_BHGKV: jax.Array) -> jax.Array:
    """Weighted sums of a group's states, one for each block."""
    if link_BHGG.shape[-1] == 1:
        return jnp.zeros_like(states_BHGKV)  # A lone block has no predecessor in its group.
    link_BHGG = jnp.broadcast_to(link_BHGG, (*states_BHGKV.shape[:3], link_BHGG.shape[-1]))
    return jnp.einsum("nhba,nhakv->nhbkv", link_BHGG, states_BHGKV, precision="highest")


def _scale(x_BHGCD: jax.Array, weight_BHGC: jax.Array) -> jax.Array:
    return (x_BHGCD * weight_BHGC[..., None]).astype(x_BHGCD.dtype)


def _dot(spec: str, left: jax.Array, right: jax.Array, weights: _Weights) -> jax.Array:
    """Matrix product of operands in the inputs' dtype, accumulated in the state's."""
    return jnp.einsum(spec, left, right, preferred_element_type=weights.carry_BHG.dtype)
