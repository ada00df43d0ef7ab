"""Which mesh axes each dimension of an array is split over, and how code meets the mesh.

Arrays name their dimensions by logical axes. One table turns them into mesh axes. Without a mesh in scope everything
here does nothing, and the model is ordinary single-device JAX.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mmx.config import BATCH_AXES

LogicalAxes = Sequence[str | None]

# Logical axis -> mesh axes, the outermost first. Report sections 3.1 and 3.2; DESIGN: attention and experts are laid
# out independently, and every mesh axis splits the tokens that experts see.
MESH_AXES_OF: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    # Tokens of a row where every token is worked on alone: the residual stream, norms, router and experts.
    "sequence": ("context", "tensor"),
    # Tokens of a row where heads or the vocabulary are split over ``tensor``.
    "attention_sequence": ("context",),
    "heads": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
    "expert_hidden": ("expert_tensor",),
    # The hidden dimension of a weight as it is computed with, ...
    "hidden": (),
    # ... and at rest: over all devices that would otherwise hold the same numbers, ``replica`` excepted.
    "stored_hidden": ("fsdp", "expert", "expert_tensor", "context"),
    "stored_expert_hidden": ("fsdp", "context", "tensor"),
}
# Name of gathered weights, which the backward pass gathers again instead of keeping.
GATHERED_WEIGHT = "gathered_weight"


def spec(*axes: str | None) -> PartitionSpec:
    """The partition spec of an array whose dimensions are the given logical axes.

    Raises:
      ValueError: for a logical axis that is not in the table, or two dimensions that share a mesh axis.
    """
    entries: list[tuple[str, ...] | None] = []
    owner: dict[str, str] = {}
    for axis in axes:
        if axis is not None and axis not in MESH_AXES_OF:
            raise ValueError(f"unknown logical axis {axis!r}: use one of {', '.join(MESH_AXES_OF)}")
        mesh_axes = MESH_AXES_OF[axis] if axis is not None else ()
        for mesh_axis in mesh_axes:
            if mesh_axis in owner:
                raise ValueError(
                    f"{owner[mesh_axis]!r} and {axis!r} are both split over mesh axis {mesh_axis!r}: one array cannot "
                    "have both"
                )
            owner[mesh_axis] = axis
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def stored_axes(axes: LogicalAxes) -> tuple[str | None, ...]:
    """Logical axes of a parameter at rest, from those it is computed with."""
    hidden = "stored_expert_hidden" if "experts" in axes else "stored_hidden"
    return tuple(hidden if axis == "hidden" else axis for axis in axes)


def parameter_spec(axes: LogicalAxes, ndim: int) -> PartitionSpec:
    """How a parameter lies at rest; dimensions in front of ``axes`` (stacked layers) are not split."""
    return spec(*[None] * (ndim - len(axes)), *stored_axes(axes))


def axis_size(*mesh_axes: str) -> int:
    """Devices along mesh axes of the mesh in scope, inside an island too; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1
    for axis in mesh_axes:
        size *= 1 if mesh.empty else mesh.shape[axis]
    return size


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays x out by its logical axes."""
    return x if _no_mesh() else jax.reshard(x, spec(*axes))


def gather_weight(weight: jax.Array, axes: LogicalAxes) -> jax.Array:
    """A layer's weight as it computes with it: whole along the hidden dimension.

    The gradient flows back as a reduce-scatter to the layout at rest (FSDP).
    """
    return weight if _no_mesh() else checkpoint_name(constrain(weight, *axes), GATHERED_WEIGHT)


def gather_in_island(shard: jax.Array, axes: LogicalAxes, dtype: jnp.dtype) -> jax.Array:
    """``gather_weight`` for code inside an island, which received the parameter as it lies at rest.

    Its transpose is a reduce-scatter by construction; between islands that is left to the compiler.

    Args:
      shard: this device's part of the parameter.
      axes: logical axes that the parameter is computed with.
      dtype: the weight is cast before it travels.
    """
    weight = shard.astype(dtype)
    if _no_mesh():
        return weight
    for dimension, (axis, stored) in enumerate(zip(axes, stored_axes(axes), strict=True)):
        over = tuple(name for name in MESH_AXES_OF.get(stored, ()) if axis_size(name) > 1)
        if axis != stored and over:
            weight = _gather(weight, dimension, over)
    return checkpoint_name(weight, GATHERED_WEIGHT)


def _gather(shard: jax.Array, dimension: int, over: tuple[str, ...]) -> jax.Array:
    """An all-gather along one dimension, with the others merged around it.

    XLA for TPU makes an all-reduce and a slice, twice the bytes, of the transposed reduce-scatter if there are more
    dimensions than that, or a leading one of size 1.
    """
    before, after = shard.shape[:dimension], shard.shape[dimension + 1 :]
    lead = (math.prod(before),) if math.prod(before) > 1 else ()
    merged = shard.reshape(*lead, shard.shape[dimension], *((math.prod(after),) if after else ()))
    return lax.all_gather(merged, over, axis=len(lead), tiled=True).reshape(*before, -1, *after)


def island(function: Callable, in_axes: Sequence[LogicalAxes | None], out_axes: Any) -> Callable:
    """``function`` on each device's own shard, with every mesh axis manual (a ``shard_map`` over the whole mesh).

    Args:
      function: takes arrays or None; sees local shapes.
      in_axes: logical axes of each argument; None for an argument that is None.
      out_axes: logical axes of the result, or a tuple of them for a tuple of results; None for a result that is None.
    """
    if _no_mesh():
        return function

    def call(*arguments):
        arguments = [x if x is None else constrain(x, *axes) for x, axes in zip(arguments, in_axes, strict=True)]
        in_specs = tuple(None if x is None else spec(*axes) for x, axes in zip(arguments, in_axes, strict=True))
        out_specs = jax.tree.map(lambda axes: spec(*axes), out_axes, is_leaf=_is_axes)
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)

    return call


def _is_axes(axes: Any) -> bool:
    return axes is not None and (not axes or axes[0] is None or isinstance(axes[0], str))


def _no_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().empty
