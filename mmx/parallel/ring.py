"""Ring attention: causal softmax attention within documents, over a sequence that is split over ranks.

Every rank keeps its queries; keys and values travel once around the ring, and after each step what a rank has seen is
joined by the log-sum-exp (report section 3.2.1: the ring runs over the whole packed row, and each step knows which
documents it meets). Only the key-value heads travel. The backward pass is a second ring on which the gradients of keys
and values, in fp32, travel along with them. What is sent for the next step does not depend on what is computed in this
one, so the two can overlap.

A rank computes those pairs of blocks that the causal order and the documents leave, and skips a step that leaves none.

Shapes: B batch, S local tokens, H query heads, G key-value heads, K head channels, P ranks, N slices a rank.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mmx.parallel.sequence_layout import SequenceLayout
from mmx.parallel.slices import survey
from pallas_kernels.softmax_attention import softmax_attention
from pallas_kernels.softmax_attention.pairs import accumulation_dtype
from pallas_kernels.softmax_attention.part import Places
from pallas_kernels.softmax_attention.part_op import PartForm, choose_form

# Name of the output and the log-sum-exp inside. A rematerialisation policy that keeps them saves the backward pass a
# second forward ring.
RING_RESIDUALS = "ring_residuals"


def ring_attention(
    q_BSHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    segment_ids_BS: jax.Array | None,
    *,
    axis: str,
    layout: SequenceLayout,
    slice_ids_BN: jax.Array | None = None,
    block: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of rows split over ``axis``; call it inside a ``shard_map`` where that axis is manual.

    Args:
      q_BSHK, k_BSGK, v_BSGK: this rank's tokens, in layout order, of one floating dtype; H is a multiple of G. RoPE, if
        any, is already in them.
      segment_ids_BS: document ids of the local tokens, or None for one document a row. Ids need only differ between
        neighbours: documents are numbered over the whole row before their numbers travel.
      axis: name of the mesh axis.
      layout: which slices each rank holds.
      slice_ids_BN: this rank's slices of each row, in a layout that depends on the documents; else None.
      block: tokens in a block; the target platform's if None.
      implementation: of the parts, as ``choose_form`` takes it.

    Returns:
      o [B, S, H, K] of the local tokens, in v's dtype; scale 1/sqrt(K), softmax and sums in fp32.

    Raises:
      NotImplementedError: if a forced implementation cannot run, with the reason.
    """
    if lax.axis_size(axis) == 1:
        return softmax_attention(q_BSHK, k_BSGK, v_BSGK, segment_ids_BS=segment_ids_BS)
    slices = survey(segment_ids_BS, slice_ids_BN, q_BSHK.shape[1], axis, layout)
    ring = _Ring(axis, choose_form(q_BSHK, v_BSGK, slices.length, block, implementation))
    return _ring(q_BSHK, k_BSGK, v_BSGK, slices.runs_BS, slices.all_BT, ring)


class _Ring(NamedTuple):
    """What is static."""

    axis: str
    form: PartForm

    @property
    def size(self) -> int:
        return lax.axis_size(self.axis)

    def forward(self, x: Any) -> Any:
        """To the next rank."""
        ring = [(rank, (rank + 1) % self.size) for rank in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, ring), x)

    def places(self, all_BT: jax.Array, runs_BS: jax.Array | None, step: jax.Array | int) -> Places:
        """Of the tokens that have come here from ``step`` ranks before; those bring their runs."""
        rank = (lax.axis_index(self.axis) - step) % self.size
        N = all_BT.shape[1] // self.size
        ids_BN = lax.dynamic_slice_in_dim(all_BT, rank * N, N, axis=1)
        positions_BNL = ids_BN[..., None] * self.form.slice_length + jnp.arange(self.form.slice_length, dtype=jnp.int32)
        return Places(positions_BNL.reshape(ids_BN.shape[0], -1), runs_BS)


class _Travelling(NamedTuple):
    k_BSGK: jax.Array
    v_BSGK: jax.Array
    runs_BS: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring(q_BSHK, k_BSGK, v_BSGK, runs_BS, all_BT, ring: _Ring):
    return _ring_forward(q_BSHK, k_BSGK, v_BSGK, runs_BS, all_BT, ring)[0]


def _ring_forward(q_BSHK, k_BSGK, v_BSGK, runs_BS, all_BT, ring: _Ring):
    # Tied to q: rematerialisation would run the ring's loop for what depends on the documents alone, and the constants
    # beside it, once for both passes, and keep that of every step.
    q_BSHK, runs_BS, all_BT = lax.optimization_barrier((q_BSHK, runs_BS, all_BT))
    scale, own = q_BSHK.shape[-1] ** -0.5, ring.places(all_BT, runs_BS, 0)

    def join(seen, here: _Travelling, step):
        places = ring.places(all_BT, here.runs_BS, step)

        def with_part(o_BSHK, lse_BSH):
            o_part, lse_part = ring.form.attention(q_BSHK, here.k_BSGK, here.v_BSGK, own, places, scale)
            lse = jnp.logaddexp(lse_BSH, lse_part)
            old, new = jnp.exp(lse_BSH - lse)[..., None], jnp.exp(lse_part - lse)[..., None]
            return old * o_BSHK + new * o_part, lse

        return lax.cond(ring.form.any_work(own, places), with_part, lambda *seen: seen, *seen)

    def step(carry, step):
        here, seen = carry
        coming = ring.forward(here)
        return (coming, join(seen, here, step)), None

    here = _Travelling(k_BSGK, v_BSGK, runs_BS)
    coming = ring.forward(here)
    # The first step has every query see itself, so that the log-sum-exps are real from here on.
    o_BSHK, lse_BSH = ring.form.attention(q_BSHK, k_BSGK, v_BSGK, own, own, scale)
    seen = o_BSHK.astype(lse_BSH.dtype), lse_BSH
    (here, seen), _ = lax.scan(step, (coming, seen), jnp.arange(1, ring.size - 1, dtype=jnp.int32))
    o_BSHK, lse_BSH = join(seen, here, ring.size - 1)
    o_BSHK = checkpoint_name(o_BSHK.astype(v_BSGK.dtype), RING_RESIDUALS)
    lse_BSH = checkpoint_name(lse_BSH, RING_RESIDUALS)
    return o_BSHK, (q_BSHK, k_BSGK, v_BSGK, runs_BS, all_BT, o_BSHK, lse_BSH)


def _ring_backward(ring: _Ring, residuals, do_BSHK):
    q_BSHK, k_BSGK, v_BSGK, runs_BS, all_BT, o_BSHK, lse_BSH = residuals
    scale, own = q_BSHK.shape[-1] ** -0.5, ring.places(all_BT, runs_BS, 0)
    delta_BSH = jnp.sum(do_BSHK.astype(lse_BSH.dtype) * o_BSHK, axis=-1)

    def part(here: _Travelling, places: Places):
        operands = (q_BSHK, here.k_BSGK, here.v_BSGK, own, places, scale)
        return ring.form.gradients(*operands, do_BSHK, lse_BSH, delta_BSH)

    def add(dq_BSHK, here: _Travelling, dkv, step):
        """Gradients with this step's share, once those of the keys and values that are here have come after them."""
        places = ring.places(all_BT, here.runs_BS, step)
        idle = lambda here, places: tuple(jnp.zeros(x.shape, dtype) for x in (q_BSHK, *here[:2]))  # noqa: E731
        dq, *more = lax.cond(ring.form.any_work(own, places), part, idle, here, places)
        return dq_BSHK + dq, jax.tree.map(jnp.add, dkv, tuple(more))

    def step(carry, step):
        here, dq_BSHK, dkv = carry
        coming, dkv = ring.forward(here), ring.forward(dkv)
        return (coming, *add(dq_BSHK, here, dkv, step)), None

    dtype = accumulation_dtype(q_BSHK)
    here = _Travelling(k_BSGK, v_BSGK, runs_BS)
    coming = ring.forward(here)
    dq_BSHK, *dkv = part(here, own)
    carry, _ = lax.scan(step, (coming, dq_BSHK, tuple(dkv)), jnp.arange(1, ring.size - 1, dtype=jnp.int32))
    here, dq_BSHK, dkv = carry
    dq_BSHK, dkv = add(dq_BSHK, here, ring.forward(dkv), ring.size - 1)
    # They stand one rank before their own.
    dk_BSGK, dv_BSGK = ring.forward(dkv)
    return dq_BSHK.astype(q_BSHK.dtype), dk_BSGK.astype(k_BSGK.dtype), dv_BSGK.astype(v_BSGK.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)
