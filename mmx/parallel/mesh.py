"""The mesh of a run: six named axes, all of them explicit, so that every array's type says how it is split."""

from __future__ import annotations

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from mmx.config import MESH_AXES, ConfigError, MeshConfig

_EXPLICIT = (AxisType.Explicit,) * len(MESH_AXES)


def build_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over ``devices`` (all of the run's devices if None).

    Neighbours on a mesh axis are neighbours on the machine's fast links as far as its shape allows. Where TPU slices
    are joined over a slow network, ``replica``, the outermost axis, goes across them and no other axis does.

    Raises:
      ConfigError: if the axis sizes do not multiply to the number of devices, or the slices do not divide ``replica``.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(config.sizes(len(devices)).values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    replica, *inner = sizes
    if slices == 1:
        # A mesh axis may take a part of an axis of the torus: sizes need not follow the machine's shape.
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=_EXPLICIT)
    if replica % slices:
        raise ConfigError(
            f"mesh.replica={replica} does not span the {slices} slices of this run: use a multiple of {slices}, so "
            "that only replicas talk over the network between slices"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (replica // slices, *inner), (slices, *[1] * len(inner)), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, MESH_AXES, axis_types=_EXPLICIT)


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    """A mesh without devices, under which ``jax.eval_shape`` tells how every array would be split.

    Raises:
      ConfigError: if the axis sizes do not multiply to ``num_devices``.
    """
    return AbstractMesh(tuple(config.sizes(num_devices).values()), MESH_AXES, axis_types=_EXPLICIT)
