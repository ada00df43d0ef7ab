"""The mesh of a run: six named axes, all of them explicit, so that every array's type says how it is split."""

import jax
from jax.sharding import AxisType, Mesh

from mmx.config import MESH_AXES, MeshConfig


def build_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over ``devices`` (all of the run's devices if None).

    Raises:
      ConfigError: if the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES), devices=devices
    )
