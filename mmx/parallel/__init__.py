"""The mesh and how arrays lie on it."""

from mmx.parallel.axes import constrain, gather_weight, island, parameter_spec, spec
from mmx.parallel.mesh import build_mesh

__all__ = ["build_mesh", "constrain", "gather_weight", "island", "parameter_spec", "spec"]
