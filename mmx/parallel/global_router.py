"""The global router: experts' capacities shared by all devices (report section 2.2).

Within one device an expert's load swings widely, so a capacity per device drops tokens that others would have had room
for. Here the numbers of assignments to each expert are gathered over the whole mesh before anything is dropped, and
one capacity holds for all of a batch's tokens. They fill it by choice first, then by row and by position in the row,
so which assignments are dropped is the same on every mesh.

Shapes: B rows and S tokens of this device, J chosen experts a token, E experts, L pieces that this device's part of a
row consists of, I tokens of a piece; G rows and W pieces of the whole batch.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmx.config import BATCH_AXES, MESH_AXES
from mmx.parallel.axes import axis_size
from mmx.parallel.sequence_layout import SequenceLayout


def globally_kept(
    experts_BSJ: jax.Array, num_experts: int, capacity_factor: float, layout: SequenceLayout
) -> jax.Array:
    """Which assignments find room, bool [B, S, J]; runs inside an island whose tokens are split over every axis.

    Args:
      experts_BSJ: chosen experts of this device's tokens.
      capacity_factor: an expert takes this many times the even share of all the batch's assignments.
      layout: of the rows over ``context``.
    """
    B, S, J = experts_BSJ.shape
    devices = math.prod(axis_size(axis) for axis in MESH_AXES)
    capacity = math.ceil(capacity_factor * B * S * devices * J / num_experts)
    places_CTL = _places(axis_size("context"), axis_size("tensor"), layout)
    L = places_CTL.shape[2]
    chosen_BLIJE = jax.nn.one_hot(experts_BSJ.reshape(B, L, S // L, J), num_experts, dtype=jnp.int32)
    counts_JGWE = _gather_counts(chosen_BLIJE.sum(2), places_CTL)

    flat = counts_JGWE.reshape(-1, num_experts)
    before_JGWE = (jnp.cumsum(flat, axis=0) - flat).reshape(counts_JGWE.shape)
    first_row = _index(BATCH_AXES) * B
    mine_JBWE = lax.dynamic_slice_in_dim(before_JGWE, first_row, B, axis=1)
    my_places_L = jnp.asarray(places_CTL)[_index(("context",)), _index(("tensor",))]
    before_BLJE = jnp.moveaxis(mine_JBWE[:, :, my_places_L], 0, 2)

    rank_BLIJE = before_BLJE[:, :, None] + jnp.cumsum(chosen_BLIJE, axis=2) - 1
    rank_BLIJ = jnp.sum(jnp.where(chosen_BLIJE > 0, rank_BLIJE, 0), axis=-1)
    return (rank_BLIJ < capacity).reshape(B, S, J)


def _places(context: int, tensor: int, layout: SequenceLayout) -> np.ndarray:
    """Where each device's pieces of a row come in the row's order, [context, tensor, L].

    A rank of ``context`` has L slices, which ``tensor`` cuts on: L pieces a device keep every piece inside one slice.
    """
    slices_CL = layout.slice_ids(context)
    pieces_CLT = slices_CL[:, :, None] * tensor + np.arange(tensor)
    return pieces_CLT.reshape(context, tensor, -1)


def _gather_counts(counts_BLJE: jax.Array, places_CTL: np.ndarray) -> jax.Array:
    """Counts of the whole batch, [J, G, W, E], rows and pieces in order."""
    over = tuple(axis for axis in MESH_AXES if axis_size(axis) > 1)
    B, L, J, E = counts_BLJE.shape
    gathered = lax.all_gather(counts_BLJE, over) if over else counts_BLJE[None]
    pieces = places_CTL.shape[0] * places_CTL.shape[1]
    gathered = gathered.reshape(-1, pieces, B, L, J, E)  # Batch axes come before context and tensor.
    by_row = jnp.moveaxis(gathered, 1, 2).reshape(-1, pieces * L, J, E)
    return jnp.moveaxis(by_row[:, np.argsort(places_CTL.reshape(-1))], 2, 0)


def _index(axes: tuple[str, ...]) -> jax.Array | int:
    """This device's place along mesh axes taken together, the first of them outermost."""
    index = 0
    for axis in axes:
        if axis_size(axis) > 1:
            index = index * axis_size(axis) + lax.axis_index(axis)
    return index
