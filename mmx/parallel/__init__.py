"""The mesh, how arrays lie on it, and the algorithms that run across it."""

from mmx.parallel.axes import (
    axis_size,
    constrain,
    gather_in_island,
    gather_weight,
    island,
    parameter_spec,
    spec,
    stored_axes,
)
from mmx.parallel.mesh import abstract_mesh, build_mesh

__all__ = [
    "abstract_mesh",
    "axis_size",
    "build_mesh",
    "constrain",
    "gather_in_island",
    "gather_weight",
    "island",
    "parameter_spec",
    "spec",
    "stored_axes",
]
