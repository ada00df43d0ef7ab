"""A checkpoint of ours written and read by pieces, so that neither needs the memory of a model.

What Orbax writes and reads are whole arrays. Here it is handed arrays that do not exist yet, with a handler that pulls
their pieces from a source and writes each into the array's own chunks; folders, metadata and the final rename stay
Orbax's. Reading opens the arrays of a checkpoint in tensorstore, which knows their chunks, and reads boxes.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mmx.config import ConfigError, ModelConfig, from_dict, to_dict
from mmx.convert.load import pieces
from mmx.convert.names import Path
from mmx.convert.source import Source, parameter_shapes, unflatten
from mmx.convert.transfer import Box
from mmx.train.checkpoint import MODEL, PARAMETERS_ONLY, PROGRESS, STATE

# Pieces that are being written at a time: several are committed together.
_WRITES = 4


def write_checkpoint(source: Source, folder: FilePath, progress: Callable[[int], None]) -> None:
    """Writes the parameters of a source as step 0 of a folder of checkpoints, which is empty or does not exist.

    Args:
      progress: called with the bytes of each piece that was written.
    """
    shapes = parameter_shapes(source.config)
    arrays = {path: _Streamed(source, path, progress) for path in shapes}
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Streamed, _StreamedHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handlers = {
        STATE: ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        MODEL: ocp.JsonCheckpointHandler(),
        PROGRESS: ocp.JsonCheckpointHandler(),
    }
    items = {
        STATE: ocp.args.PyTreeSave({"params": unflatten(arrays)}),
        MODEL: ocp.args.JsonSave(to_dict(source.config)),
        PROGRESS: ocp.args.JsonSave({PARAMETERS_ONLY: True}),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    try:
        with ocp.CheckpointManager(folder.absolute(), item_handlers=handlers, options=options) as manager:
            manager.save(0, args=ocp.args.Composite(**items))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def require_room(folder: FilePath, needed: int) -> None:
    """Raises ConfigError if the disk that holds a folder, or will, has less room than ``needed`` bytes."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"the disk is full: {folder} needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} are left; "
            "free some space, or choose another target"
        )


class CheckpointReader:
    """The parameters of a checkpoint of ours, read by boxes.

    Args:
      folder: of the checkpoints.
      step: None takes the newest.
      cache_bytes: of chunks that are kept for the next box; training writes chunks that several tensors share.

    Raises:
      ConfigError: if the folder has no such checkpoint.
    """

    def __init__(self, folder: FilePath, step: int | None = None, cache_bytes: int = 0):
        steps = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())
        if not steps or (step is not None and step not in steps):
            raise ConfigError(f"{folder} holds no checkpoint{'' if step is None else f' of step {step}'}")
        self.path = folder / str(steps[-1] if step is None else step)
        try:
            self.config = from_dict(json.loads((self.path / MODEL / "metadata").read_text()), ModelConfig)
            self._driver = "zarr3" if json.loads((self.path / STATE / "_METADATA").read_text())["use_zarr3"] else "zarr"
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{self.path} cannot be read as a checkpoint of mmx ({error})") from None
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        self._arrays: dict[Path, Any] = {}

    def read(self, path: Path, box: Box) -> np.ndarray:
        """A box of a parameter."""
        if path not in self._arrays:
            self._arrays[path] = self._open(path)
        try:
            return self._arrays[path][box].read().result()
        except ValueError as error:
            raise ConfigError(f"{self.path}: {'.'.join(path)} cannot be read ({_first_line(error)})") from None

    def _open(self, path: Path) -> Any:
        name, shape = ".".join(("params", *path)), parameter_shapes(self.config)[path].shape
        base = {"driver": "ocdbt", "base": f"file://{(self.path / STATE).absolute()}/", "path": f"{name}/"}
        try:
            array = ts.open({"driver": self._driver, "kvstore": base}, context=self._context, read=True).result()
        except ValueError as error:
            raise ConfigError(f"{self.path} lacks {name}, or it cannot be read ({_first_line(error)})") from None
        if array.shape != shape:
            raise ConfigError(f"{self.path}: {name} has shape {list(array.shape)} and its model asks for {list(shape)}")
        return array


class _Streamed:
    """A parameter that exists as a source of pieces alone."""

    def __init__(self, source: Source, path: Path, progress: Callable[[int], None]):
        self.source, self.path, self.progress = source, path, progress
        leaf = parameter_shapes(source.config)[path]
        self.shape, self.dtype = leaf.shape, leaf.dtype
        self.size, self.nbytes = leaf.size, leaf.size * leaf.dtype.itemsize


class _StreamedHandler(ocp.type_handlers.TypeHandler):
    """Lets Orbax write ``_Streamed`` as it writes arrays."""

    def typestr(self) -> str:
        """What reads it back."""
        return "np.ndarray"

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Any:
        """Not read back by this handler."""
        raise NotImplementedError

    async def deserialize(self, infos: Sequence[ocp.type_handlers.ParamInfo], args: Any = None) -> Any:
        """Not read back by this handler."""
        raise NotImplementedError

    async def serialize(
        self, values: Sequence[_Streamed], infos: Sequence[ocp.type_handlers.ParamInfo], args: Any = None
    ) -> Sequence[ocp.future.Future]:
        """Writes one array after another, a few pieces in the air while the next is read.

        All of it happens here and nothing in Orbax's threads, which would print what goes wrong in pages.
        """
        del args
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            whole = tuple(slice(0, n) for n in value.shape)
            array, writing = None, deque()
            for box, piece in pieces(value.source, value.path, whole):
                if array is None:  # The first piece is as large as any: chunks of its shape are written once each.
                    array = await self._create(value, info, piece.shape)
                if len(writing) == _WRITES:
                    await writing.popleft()
                writing.append(array[box].write(piece, can_reference_source_data_indefinitely=True))
                value.progress(piece.nbytes)
            for one in writing:
                await one
        return []

    async def _create(self, value: _Streamed, info: ocp.type_handlers.ParamInfo, chunk: tuple[int, ...]) -> Any:
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=info.is_ocdbt_checkpoint,
            global_shape=value.shape,
            local_shape=chunk,
            dtype=value.dtype,
            process_index="0",
        )
        # Weights shrink by a fifth, and compressing them takes longer than writing them.
        spec["metadata"]["compressor"] = None
        return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
