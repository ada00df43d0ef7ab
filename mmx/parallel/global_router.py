"""The global router: experts' capacities shared by all devices (report section 2.2).

Within one device an expert's load swings widely, so a capacity per device drops tokens that others would have had room
for. Here the numbers of assignments to each expert are gathered over the whole mesh before anything is dropped, and
one capacity holds for all of a batch's tokens. They fill it by choice first, then by row and by position in the row,
so which assignments are dropped is the same on every mesh.

Shapes: B rows and S tokens of this device, J chosen experts a token, E experts, L slices of a row that a rank of
``context`` holds and as many pieces that one of its devices holds, I tokens of a piece; G rows and W pieces of the
whole batch.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from mmx.config import BATCH_AXES, MESH_AXES
from mmx.parallel.axes import axis_size
from mmx.parallel.sequence_layout import SequenceLayout


def globally_kept(
    experts_BSJ: jax.Array,
    num_experts: int,
    capacity_factor: float,
    layout: SequenceLayout,
    slice_ids_BL: jax.Array | None = None,
) -> jax.Array:
    """Which assignments find room, bool [B, S, J]; runs inside an island whose tokens are split over every axis.

    Args:
      experts_BSJ: chosen experts of this device's tokens.
      capacity_factor: an expert takes this many times the even share of all the batch's assignments.
      layout: of the rows over ``context``.
      slice_ids_BL: this rank's slices of each row, in a layout that depends on the documents; else None.
    """
    B, S, J = experts_BSJ.shape
    devices = math.prod(axis_size(axis) for axis in MESH_AXES)
    capacity = math.ceil(capacity_factor * B * S * devices * J / num_experts)
    if slice_ids_BL is None:
        mine_L = jnp.asarray(layout.slice_ids(axis_size("context")))[_index(("context",))]
        slice_ids_BL = jnp.broadcast_to(mine_L, (B, *mine_L.shape))
    places_BL = _places(slice_ids_BL)
    L = places_BL.shape[1]
    chosen_BLIJE = jax.nn.one_hot(experts_BSJ.reshape(B, L, S // L, J), num_experts, dtype=jnp.int32)
    counts_JGWE = _counts_in_order(chosen_BLIJE.sum(2), places_BL)

    flat = counts_JGWE.reshape(-1, num_experts)
    before_JGWE = (jnp.cumsum(flat, axis=0) - flat).reshape(counts_JGWE.shape)
    mine_JBWE = lax.dynamic_slice_in_dim(before_JGWE, _index(BATCH_AXES) * B, B, axis=1)
    before_JBLE = jnp.take_along_axis(mine_JBWE, places_BL[None, :, :, None], axis=2)
    before_BLJE = jnp.moveaxis(before_JBLE, 0, 2)

    rank_BLIJE = before_BLJE[:, :, None] + jnp.cumsum(chosen_BLIJE, axis=2) - 1
    rank_BLIJ = jnp.sum(jnp.where(chosen_BLIJE > 0, rank_BLIJE, 0), axis=-1)
    return (rank_BLIJ < capacity).reshape(B, S, J)


def _places(slice_ids_BL: jax.Array) -> jax.Array:
    """Where this device's pieces come among those of the whole row, [B, L].

    A rank of ``context`` has L slices, which ``tensor`` cuts on: L pieces a device keep every piece inside one slice.
    """
    L, tensor = slice_ids_BL.shape[1], axis_size("tensor")
    piece_L = _index(("tensor",)) * L + jnp.arange(L)
    return slice_ids_BL[:, piece_L // tensor] * tensor + piece_L % tensor


def _counts_in_order(counts_BLJE: jax.Array, places_BL: jax.Array) -> jax.Array:
    """Counts of the whole batch, [J, G, W, E], rows and pieces in order."""
    over = tuple(axis for axis in MESH_AXES if axis_size(axis) > 1)
    pieces = axis_size("context") * axis_size("tensor")

    def gather(x_BL: jax.Array) -> jax.Array:
        """[B, L, ...] of each device to [G, W, ...]."""
        x = lax.all_gather(x_BL, over) if over else x_BL[None]
        x = x.reshape(-1, pieces, *x_BL.shape)  # Batch axes come before context and tensor.
        return jnp.moveaxis(x, 1, 2).reshape(-1, pieces * x_BL.shape[1], *x_BL.shape[2:])

    order_GW = jnp.argsort(gather(places_BL), axis=1)
    in_order_GWJE = jnp.take_along_axis(gather(counts_BLJE), order_GW[:, :, None, None], axis=1)
    return jnp.moveaxis(in_order_GWJE, 2, 0)


def _index(axes: tuple[str, ...]) -> jax.Array | int:
    """This device's place along mesh axes taken together, the first of them outermost."""
    index = 0
    for axis in axes:
        if axis_size(axis) > 1:
            index = index * axis_size(axis) + lax.axis_index(axis)
    return index
