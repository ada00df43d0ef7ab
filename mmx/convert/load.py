"""Parameters straight from a checkpoint's files onto this process's devices.

Each process reads the boxes that its own devices hold, a piece at a time; a piece goes to the device and into its place
there, so that the host holds a few pieces whatever the model's size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from mmx.config import ModelConfig
from mmx.convert.names import Path
from mmx.convert.source import Source, flatten, open_directory, parameter_shapes, unflatten
from mmx.convert.transfer import Box, intersect, split
from mmx.model.text import Params, parameter_specs

# Values a piece holds at most, and pieces that are read while one is put into its place.
_PIECE = 16 << 20
_AHEAD = 2


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
    with ThreadPoolExecutor(_AHEAD) as pool, jax.set_mesh(Mesh(np.empty((), object), ())):
        for path, shape in parameter_shapes(source.config).items():
            sharding = SingleDeviceSharding(jax.local_devices()[0]) if mesh.empty else NamedSharding(mesh, specs[path])
            leaves[path] = _load(source, path, shape, sharding, pool)
    return unflatten(leaves)


def _load(
    source: Source, path: Path, leaf: jax.ShapeDtypeStruct, sharding: Sharding, pool: ThreadPoolExecutor
) -> jax.Array:
    """One parameter: every box that some device of this process holds is read once."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, indices in sharding.addressable_devices_indices_map(leaf.shape).items():
        box = tuple(one.indices(n)[:2] for one, n in zip(indices, leaf.shape, strict=True))
        holders.setdefault(box, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        box = tuple(slice(*one) for one in bounds)
        buffers = [_empty([one.stop - one.start for one in box], leaf.dtype, device) for device in devices]
        for piece, values in _read_ahead(source, path, box, pool):
            start = np.asarray([p.start - b.start for p, b in zip(piece, box, strict=True)], np.int32)
            # Waiting for the piece before keeps the host from running ahead of the devices.
            jax.block_until_ready(buffers)
            buffers = [
                _place(buffer, *jax.device_put((values, start), device))
                for buffer, device in zip(buffers, devices, strict=True)
            ]
        shards += buffers
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def _read_ahead(source: Source, path: Path, box: Box, pool: ThreadPoolExecutor) -> Iterator[tuple[Box, np.ndarray]]:
    pieces = iter(
        piece
        for part in source.parts[path]
        if (common := intersect(part, box))
        for piece in split(part, common, _PIECE)
    )
    read = lambda piece: (piece, pool.submit(source.read, path, piece))  # noqa: E731
    waiting = [read(piece) for piece in islice(pieces, _AHEAD)]
    while waiting:
        piece, values = waiting.pop(0)
        waiting += [read(following) for following in islice(pieces, 1)]
        yield piece, values.result()


def _empty(shape: list[int], dtype: Any, device: jax.Device) -> jax.Array:
    return jnp.zeros(shape, dtype, device=device)


@functools.partial(jax.jit, donate_argnums=0)
def _place(buffer: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
    """The buffer with ``values`` in their place, in the buffer's own memory."""
    return jax.lax.dynamic_update_slice(buffer, values, list(start))
