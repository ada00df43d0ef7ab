"""Sizes of the named mesh axes."""

import dataclasses
import math

from mmx.config.errors import ConfigError

MESH_AXES = ("replica", "fsdp", "expert", "expert_tensor", "context", "tensor")
# Axes over which the sequences of a batch are split (DESIGN: expert and expert_tensor are batch axes to attention).
BATCH_AXES = MESH_AXES[:4]


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the named mesh axes; one of them may be -1 for "the rest of the devices"."""

    replica: int = 1
    fsdp: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    tensor: int = 1

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis name to size, with -1 resolved. Raises ConfigError if they do not multiply to num_devices."""
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{axis}={size}: use a positive size, or -1 for the rest of the devices")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ConfigError(f"mesh.{free[0]} and mesh.{free[1]} are both -1: only one axis can take the rest")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free:
            if num_devices % fixed:
                raise ConfigError(
                    f"mesh.{free[0]}=-1 cannot take the rest: the other axes make {fixed}, which does not divide "
                    f"{num_devices} devices"
                )
            sizes[free[0]] = num_devices // fixed
        elif fixed != num_devices:
            raise ConfigError(
                f"the mesh has {_described(sizes)} and this run has {num_devices} devices: "
                "change a mesh axis, or set one to -1"
            )
        return sizes


def _described(sizes: dict[str, int]) -> str:
    split = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    return f"{' x '.join(split)} = {math.prod(sizes.values())} devices" if split else "no axis above 1"
