"""Parameters straight from a checkpoint's files onto this process's devices.

Each process reads the boxes that its own devices hold, a piece at a time; a piece goes to the device and into its place
there, so that the host holds a few pieces whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from mmx.config import ModelConfig
from mmx.convert.ahead import read_ahead
from mmx.convert.names import Path
from mmx.convert.source import Source, flatten, open_directory, parameter_shapes, unflatten
from mmx.convert.transfer import Box, intersect, split
from mmx.model.text import Params, parameter_specs

# Values a piece holds at most, and bytes of pieces that are read while one is put into its place.
PIECE = 16 << 20
_AHEAD_BYTES = 256 << 20


def load_huggingface(folder: FilePath, dtype: str | None = None) -> tuple[ModelConfig, Params]:
    """A model from a Hugging Face directory: laid out on the mesh in scope, or on the first device without one.

    Args:
      dtype: of the parameters; None keeps the checkpoint's own.

    Raises:
      ConfigError: if the directory is no checkpoint of this family, or is damaged or contradictory.
    """
    source, _ = open_directory(folder, dtype)
    return source.config, load_parameters(source)


def load_parameters(source: Source) -> Params:
    """Parameters of a source, laid out as in ``load_huggingface``."""
    mesh = jax.sharding.get_mesh()
    specs = flatten(parameter_specs(source.config))
    leaves = {}
    # What happens on a single device cannot happen in the scope of a mesh of several.
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        for path, shape in parameter_shapes(source.config).items():
            one = SingleDeviceSharding(jax.local_devices()[0])
            leaves[path] = _load(source, path, shape, one if mesh.empty else NamedSharding(mesh, specs[path]))
    return unflatten(leaves)


def _load(source: Source, path: Path, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    """One parameter: every box that some device of this process holds is read once."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, indices in sharding.addressable_devices_indices_map(leaf.shape).items():
        box = tuple(one.indices(n)[:2] for one, n in zip(indices, leaf.shape, strict=True))
        holders.setdefault(box, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        box = tuple(slice(*one) for one in bounds)
        buffers = [_empty([one.stop - one.start for one in box], leaf.dtype, device) for device in devices]
        for piece, values in pieces(source, path, box):
            start = np.asarray([p.start - b.start for p, b in zip(piece, box, strict=True)], np.int32)
            # Waiting for the piece before keeps the host from running ahead of the devices.
            jax.block_until_ready(buffers)
            buffers = [
                _place(buffer, *jax.device_put((values, start), device))
                for buffer, device in zip(buffers, devices, strict=True)
            ]
        shards += buffers
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def pieces(source: Source, path: Path, box: Box) -> Iterator[tuple[Box, np.ndarray]]:
    """The values of a box of a parameter, in boxes of bounded size, as they are read from the files."""
    boxes = (
        (part, piece)
        for part in source.parts[path]
        if (common := intersect(part, box))
        for piece in split(part, common, PIECE)
    )
    itemsize = parameter_shapes(source.config)[path].dtype.itemsize
    read = lambda part, piece: (piece, source.read_part(part, piece))  # noqa: E731
    tasks = (
        (math.prod(one.stop - one.start for one in piece) * itemsize, partial(read, part, piece))
        for part, piece in boxes
    )
    return read_ahead(tasks, _AHEAD_BYTES)


def _empty(shape: list[int], dtype: Any, device: jax.Device) -> jax.Array:
    return jnp.zeros(shape, dtype, device=device)


@partial(jax.jit, donate_argnums=0)
def _place(buffer: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
    """The buffer with ``values`` in their place, in the buffer's own memory."""
    # As integers: XLA's CPU backend would convert all of a bf16 buffer to fp32 and back for every piece.
    bits = jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")
    buffer_bits, value_bits = (lax.bitcast_convert_type(x, bits) for x in (buffer, values))
    return lax.bitcast_convert_type(lax.dynamic_update_slice(buffer_bits, value_bits, list(start)), buffer.dtype)
