"""Lightning attention over a sequence that is split over ranks: LASP+, and LASP, its serial predecessor.

A slice's tokens reach later slices only through its state, K x V a head. Every rank runs its slices from a zero state,
which gives their outputs but for what enters from before, and their summaries: the state each of them adds. What enters
slice s is a sum of the summaries before it, each decayed by the tokens between, of those slices that the document at
the start of s reaches back to. LASP+ (report section 3.2.2) gathers all summaries at once and every rank forms its own
sums: one collective forward, one backward, whose bytes do not depend on the length. LASP hands a running state from
slice to slice: as many steps, one after the other, as ranks. Both then add ``decay * q @ entering`` to the tokens
of each slice's first document.

What the gather can overlap with is whatever does not need the output, such as the layer's gate projection: nothing
before the correction waits for it.

Shapes: B batch, S local tokens, H heads, K key channels, V value channels, P ranks, N slices a rank, T = P N slices in
the order of the ranks, L tokens of a slice, C tokens of a block; X = B N slices side by side.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mmx.parallel.sequence_layout import SequenceLayout
from mmx.parallel.slices import Slices, survey
from pallas_kernels.lightning_attention import lightning_attention

# Name of the states that enter a rank's slices. A rematerialisation policy that keeps them saves the backward pass a
# second gather.
ENTERING_STATES = "entering_states"
# Tokens that the correction works on at once; it stops behind the last one that it concerns.
_CORRECTION_BLOCK = 1024


def lasp_plus(
    q_BSHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    slopes_H: jax.Array,
    segment_ids_BS: jax.Array | None,
    *,
    axis: str,
    layout: SequenceLayout,
    slice_ids_BN: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Lightning attention of rows split over ``axis``; call it inside a ``shard_map`` where that axis is manual.

    Args:
      q_BSHK, k_BSHK, v_BSHV: this rank's tokens, in layout order, of one floating dtype.
      slopes_H: decay slopes of the local heads, constants.
      segment_ids_BS: document ids of the local tokens, or None for one document a row. A document goes on from slice to
        slice if the ids on both sides of the cut are equal.
      axis: name of the mesh axis.
      layout: which slices each rank holds.
      slice_ids_BN: this rank's slices of each row, in a layout that depends on the documents; else None.
      implementation: of ``lightning_attention``.

    Returns:
      o [B, S, H, V] of the local tokens, in v's dtype; the same as one device computes for the whole row.
    """
    operands = q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, slice_ids_BN
    return _split_attention(operands, axis, layout, implementation, _gathered_states)


def lasp(
    q_BSHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    slopes_H: jax.Array,
    segment_ids_BS: jax.Array | None,
    *,
    axis: str,
    layout: SequenceLayout,
    implementation: str = "auto",
) -> jax.Array:
    """``lasp_plus`` with LASP's communication, as the baseline of the report: the state goes from rank to rank.

    P - 1 sends forward and as many backward, each of which waits for the one before; 2 (P - 1) in the zigzag layout.

    Raises:
      ValueError: in a layout that depends on the documents, where the order of the ranks is not known beforehand.
    """
    if layout.depends_on_documents:
        raise ValueError(f"LASP hands states on in a fixed order of ranks: not in the {layout.name} layout")
    operands = q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, None
    return _split_attention(operands, axis, layout, implementation, _handed_states)


def _split_attention(
    operands: tuple[jax.Array | None, ...],
    axis: str,
    layout: SequenceLayout,
    implementation: str,
    entering_states: Callable[..., jax.Array],
) -> jax.Array:
    q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, slice_ids_BN = operands
    run = functools.partial(lightning_attention, implementation=implementation)
    if lax.axis_size(axis) == 1:
        return run(q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS=segment_ids_BS)[0]
    B, S = q_BSHK.shape[:2]
    slices = survey(segment_ids_BS, slice_ids_BN, S, axis, layout)
    slopes_H = lax.stop_gradient(slopes_H)

    side_by_side = lambda x: None if x is None else x.reshape(-1, slices.length, *x.shape[2:])  # noqa: E731
    q_XLHK, k_XLHK, v_XLHV, segment_ids_XL = map(side_by_side, (q_BSHK, k_BSHK, v_BSHV, segment_ids_BS))
    o_XLHV, summary_XHKV = run(q_XLHK, k_XLHK, v_XLHV, slopes_H, segment_ids_BS=segment_ids_XL)
    summary_BNHKV = summary_XHKV.reshape(B, -1, *summary_XHKV.shape[1:])
    entering_BNHKV = checkpoint_name(entering_states(summary_BNHKV, slopes_H, slices, axis, layout), ENTERING_STATES)
    reach_X = jnp.broadcast_to(_reach(slices), (B, summary_BNHKV.shape[1])).reshape(-1)
    o_XLHV = _add_entering(o_XLHV, q_XLHK, entering_BNHKV.reshape(summary_XHKV.shape), slopes_H, reach_X)
    return o_XLHV.reshape(v_BSHV.shape)


def _reach(slices: Slices) -> jax.Array:
    """How many tokens of each slice the state from before it concerns, int32 [B, N]."""
    if slices.runs_BS is None:
        return jnp.where(slices.own_BN > 0, slices.length, 0)
    first_BN, _ = slices.own_edges()
    runs_BNL = slices.runs_BS.reshape(*first_BN.shape, slices.length)
    before_BNT = slices.all_BT[:, None] == slices.own_BN[..., None] - 1
    goes_on_BN = jnp.any(before_BNT & (slices.last_run_BT[:, None] == first_BN[..., None]), axis=-1)
    return jnp.where(goes_on_BN, jnp.sum(runs_BNL == first_BN[..., None], axis=-1, dtype=jnp.int32), 0)


def _gathered_states(summary_BNHKV, slopes_H, slices: Slices, axis: str, layout: SequenceLayout) -> jax.Array:
    """LASP+: states entering this rank's slices from one gather of all summaries."""
    own_BN1, all_B1T = slices.own_BN[..., None], slices.all_BT[:, None]
    to_here, from_here = all_B1T < own_BN1, all_B1T > own_BN1
    if slices.runs_BS is not None:
        first_BN, last_BN = slices.own_edges()
        to_here &= slices.last_run_BT[:, None] == first_BN[..., None]
        from_here &= slices.first_run_BT[:, None] == last_BN[..., None]

    def weights(allowed_BNT):
        between_BNT = slices.length * (jnp.abs(own_BN1 - all_B1T) - 1)
        exponent_BNTH = -jnp.maximum(between_BNT, 0)[..., None] * slopes_H.astype(summary_BNHKV.dtype)
        return jnp.where(allowed_BNT[..., None], jnp.exp(exponent_BNTH), 0)

    return _gather_and_sum(summary_BNHKV, weights(to_here), weights(from_here), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather_and_sum(summary_BNHKV: jax.Array, to_here_BNTH: jax.Array, from_here_BNTH: jax.Array, axis: str):
    """Weighted sums of all ranks' summaries. Backward: the same of the cotangents, with the weights seen from there."""
    return _weighted_sum(to_here_BNTH, lax.all_gather(summary_BNHKV, axis))


def _gather_and_sum_forward(summary_BNHKV, to_here_BNTH, from_here_BNTH, axis):
    return _gather_and_sum(summary_BNHKV, to_here_BNTH, from_here_BNTH, axis), from_here_BNTH


def _gather_and_sum_backward(axis, from_here_BNTH, dentering_BNHKV):
    return _weighted_sum(from_here_BNTH, lax.all_gather(dentering_BNHKV, axis)), None, None


_gather_and_sum.defvjp(_gather_and_sum_forward, _gather_and_sum_backward)


def _weighted_sum(weights_BNTH: jax.Array, states_PBNHKV: jax.Array) -> jax.Array:
    P, B, N = states_PBNHKV.shape[:3]
    weights_BNPMH = jnp.broadcast_to(weights_BNTH, (B, *weights_BNTH.shape[1:])).reshape(B, N, P, N, -1)
    return jnp.einsum("bnpmh,pbmhkv->bnhkv", weights_BNPMH, states_PBNHKV, precision="highest")


def _handed_states(summary_BNHKV, slopes_H, slices: Slices, axis: str, layout: SequenceLayout) -> jax.Array:
    """LASP: states entering this rank's slices, handed over from the rank of the slice before."""
    ranks, rank = lax.axis_size(axis), lax.axis_index(axis)
    owners = {int(s): divmod(t, summary_BNHKV.shape[1]) for t, s in enumerate(layout.slice_ids(ranks).reshape(-1))}
    whole_BN = True
    if slices.runs_BS is not None:
        first_BN, last_BN = slices.own_edges()
        whole_BN = first_BN == last_BN
    through_H = jnp.exp(-slices.length * slopes_H.astype(summary_BNHKV.dtype))
    through_BNH = jnp.where(jnp.asarray(whole_BN)[..., None], through_H, 0)
    through_BNHKV = jnp.broadcast_to(through_BNH[..., None, None], summary_BNHKV.shape)
    goes_on_BN = jnp.broadcast_to(_reach(slices) > 0, summary_BNHKV.shape[:2])

    entering = [jnp.zeros_like(summary_BNHKV[:, 0])] * summary_BNHKV.shape[1]
    for s in range(len(owners) - 1):
        (giver, n), (taker, m) = owners[s], owners[s + 1]
        leaving_BHKV = summary_BNHKV[:, n] + through_BNHKV[:, n] * entering[n]
        if giver != taker:
            leaving_BHKV = lax.ppermute(leaving_BHKV, axis, [(giver, taker)])
        taken_B = goes_on_BN[:, m] & (rank == taker)
        entering[m] += jnp.where(taken_B[:, None, None, None], leaving_BHKV, 0)
    return jnp.stack(entering, axis=1)


@jax.custom_vjp
def _add_entering(o_XLHV, q_XLHK, entering_XHKV, slopes_H, reach_X):
    """o plus what the entering states add to the first ``reach`` tokens of each slice; no block behind is touched."""
    return _add_entering_forward(o_XLHV, q_XLHK, entering_XHKV, slopes_H, reach_X)[0]


def _add_entering_forward(o_XLHV, q_XLHK, entering_XHKV, slopes_H, reach_X):
    blocks = _Blocks(slopes_H, reach_X, o_XLHV.shape[1], entering_XHKV.dtype)
    states_XHKV = entering_XHKV.astype(q_XLHK.dtype)

    def add(j, o_XLHV):
        decay_XHC1 = blocks.decay(j)
        q_XHCK = (blocks.take(q_XLHK, j) * decay_XHC1).astype(q_XLHK.dtype)
        more_XHCV = _dot("xhck,xhkv->xhcv", q_XHCK, states_XHKV, entering_XHKV.dtype)
        return blocks.put(o_XLHV, blocks.take(o_XLHV, j) + more_XHCV, j)

    o_XLHV = lax.fori_loop(0, blocks.count, add, o_XLHV)
    return o_XLHV, (q_XLHK, entering_XHKV, slopes_H, reach_X)


def _add_entering_backward(residuals, do_XLHV):
    q_XLHK, entering_XHKV, slopes_H, reach_X = residuals
    blocks = _Blocks(slopes_H, reach_X, do_XLHV.shape[1], entering_XHKV.dtype)
    states_XHKV = entering_XHKV.astype(q_XLHK.dtype)

    def add(j, carry):
        dq_XLHK, dentering_XHKV = carry
        decay_XHC1, do_XHCV = blocks.decay(j), blocks.take(do_XLHV, j)
        q_XHCK = (blocks.take(q_XLHK, j) * decay_XHC1).astype(q_XLHK.dtype)
        dentering_XHKV += _dot("xhck,xhcv->xhkv", q_XHCK, do_XHCV, entering_XHKV.dtype)
        dq_XHCK = decay_XHC1 * _dot("xhcv,xhkv->xhck", do_XHCV, states_XHKV, entering_XHKV.dtype)
        return blocks.put(dq_XLHK, blocks.take(dq_XLHK, j) + dq_XHCK, j), dentering_XHKV

    start = jnp.zeros_like(q_XLHK), jnp.zeros_like(entering_XHKV)
    dq_XLHK, dentering_XHKV = lax.fori_loop(0, blocks.count, add, start)
    return do_XLHV, dq_XLHK, dentering_XHKV, None, None


_add_entering.defvjp(_add_entering_forward, _add_entering_backward)


class _Blocks:
    """Blocks of tokens from the start of each slice, as many as any slice's reach asks for."""

    def __init__(self, slopes_H: jax.Array, reach_X: jax.Array, length: int, dtype: jnp.dtype):
        self._slopes_H, self._reach_X, self._length = slopes_H.astype(dtype), reach_X, length
        self._block = min(_CORRECTION_BLOCK, length)
        self.count = -(-jnp.max(reach_X) // self._block)

    def _start(self, j):
        # The last block may overlap the one before; the decay leaves out what was done there.
        return jnp.minimum(j * self._block, self._length - self._block)

    def decay(self, j: jax.Array) -> jax.Array:
        """exp(-slope (t + 1)) of block j's tokens t, 0 beyond the reach; [X, H, C, 1]."""
        t_C = self._start(j) + np.arange(self._block)
        decay_HC = jnp.exp(-self._slopes_H[:, None] * (t_C + 1))
        new_XC = (t_C >= j * self._block) & (t_C < self._reach_X[:, None])
        return jnp.where(new_XC[:, None], decay_HC, 0)[..., None]

    def take(self, x_XLHD: jax.Array, j: jax.Array) -> jax.Array:
        """Block j, [X, H, C, D]."""
        return lax.dynamic_slice_in_dim(x_XLHD, self._start(j), self._block, axis=1).swapaxes(1, 2)

    def put(self, x_XLHD: jax.Array, block_XHCD: jax.Array, j: jax.Array) -> jax.Array:
        """x with block j replaced."""
        block_XCHD = block_XHCD.swapaxes(1, 2).astype(x_XLHD.dtype)
        return lax.dynamic_update_slice_in_dim(x_XLHD, block_XCHD, self._start(j), axis=1)


def _dot(spec: str, left: jax.Array, right: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum(spec, left, right, preferred_element_type=dtype)
