"""Which mesh axes each dimension of an array is split over, and how code meets the mesh.

Arrays name their dimensions by logical axes. One table turns them into mesh axes. Without a mesh in scope everything
here does nothing, and the model is ordinary single-device JAX.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from mmx.config import BATCH_AXES

LogicalAxes = Sequence[str | None]

# Logical axis -> mesh axes. None, and any axis not listed, is not split.
_MESH_AXES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "sequence": ("context",),
    # The hidden dimension of a parameter at rest; layers gather it before use.
    "stored_hidden": ("fsdp",),
}
# Name of gathered weights, which the backward pass gathers again instead of keeping.
GATHERED_WEIGHT = "gathered_weight"


def spec(*axes: str | None) -> PartitionSpec:
    """The partition spec of an array whose dimensions are the given logical axes."""
    return PartitionSpec(*(_MESH_AXES.get(axis) if axis is not None else None for axis in axes))


def parameter_spec(axes: LogicalAxes, ndim: int) -> PartitionSpec:
    """How a parameter lies at rest; dimensions in front of ``axes`` (stacked layers) are not split."""
    return spec(*[None] * (ndim - len(axes)), *("stored_hidden" if axis == "hidden" else axis for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays x out by its logical axes."""
    return x if _no_mesh() else jax.reshard(x, spec(*axes))


def gather_weight(weight: jax.Array, axes: LogicalAxes) -> jax.Array:
    """A layer's weight as it computes with it: whole along the hidden dimension.

    The gradient flows back as a reduce-scatter to the layout at rest (FSDP).
    """
    return weight if _no_mesh() else checkpoint_name(constrain(weight, *axes), GATHERED_WEIGHT)


def island(function: Callable, in_axes: Sequence[LogicalAxes | None], out_axes: Any) -> Callable:
    """``function`` on each device's own shard, with every mesh axis manual (a ``shard_map`` over the whole mesh).

    Args:
      function: takes arrays or None; sees local shapes.
      in_axes: logical axes of each argument; None for an argument that is None.
      out_axes: logical axes of the result, or a tuple of them for a tuple of results.
    """
    if _no_mesh():
        return function

    def call(*arguments):
        arguments = [x if x is None else constrain(x, *axes) for x, axes in zip(arguments, in_axes, strict=True)]
        in_specs = tuple(None if x is None else spec(*axes) for x, axes in zip(arguments, in_axes, strict=True))
        is_axes = lambda axes: not axes or axes[0] is None or isinstance(axes[0], str)  # noqa: E731
        out_specs = jax.tree.map(lambda axes: spec(*axes), out_axes, is_leaf=is_axes)
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)

    return call


def _no_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().empty
