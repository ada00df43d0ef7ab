"""Compiles a function for a TPU with no TPU present: libtpu's compiler needs only the chip's name.

Errors are the real ones: a block shape that Mosaic does not take, too much VMEM, too much HBM.
"""

import functools
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.aot.chips import Chip

# libtpu reads these when it is loaded: several processes may load it, there is no host to ask about the machine, and
# logs, which would fill the temporary folder, are of no use.
COMPILER_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
}


def missing_compiler() -> str | None:
    """Why nothing can be compiled for TPU here, or None."""
    try:
        compiler_version()
    except importlib.metadata.PackageNotFoundError:
        return "libtpu is not installed: pip install -e '.[tpu]'"
    return None


def compiler_version() -> str:
    """The version of libtpu, whose compiler every static figure depends on."""
    return importlib.metadata.version("libtpu")


def compile_for_chip(chip: Chip, function: Callable, *shapes: Any) -> jax.stages.Compiled:
    """Compiles ``function`` for one device of ``chip``, with a mesh of it in scope, so that "auto" choices are its.

    Args:
      function: any; one that is jitted keeps its donations.
      shapes: arguments, as pytrees of ``jax.ShapeDtypeStruct``; their shardings are set here.
    """
    with jax.set_mesh(_mesh(chip)):
        jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
        return jitted.lower(*on_chip(chip, shapes)).compile()


def on_chip(chip: Chip, shapes: Any) -> Any:
    """The same shapes, lying on one device of ``chip``."""
    sharding = NamedSharding(_mesh(chip), PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


@functools.cache
def _mesh(chip: Chip) -> Mesh:
    for variable, value in COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # Without the bounds, libtpu assumes hosts of four chips and refuses less than one host.
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=chip.topology, chips_per_host_bounds=[1, 1, 1]
    )
    return Mesh(np.array(topology.devices[:1]), ("device",))
