"""Reading boxes of tensors from a directory of safetensors files, in bounded memory.

The format: eight bytes of little-endian header length, a JSON header of names, dtypes, shapes and byte ranges, then the
tensors, row-major. A directory has one file, or several and an index. Nothing is ever unpickled, and a file that an
index names must lie in the directory itself.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from mmx.config import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# A file that stands in a directory as long as it is being written.
UNFINISHED = "export.unfinished.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own limit; a longer one is no header.
_MAX_HEADER_BYTES = 100_000_000
# Runs at least so long are read one by one.
_LONG_RUN_BYTES = 64 << 10


class Info(NamedTuple):
    """What is known of a tensor without reading it."""

    dtype: np.dtype
    shape: tuple[int, ...]


class TensorReader(Protocol):
    """Something that holds named tensors: a directory, or arrays in memory."""

    def names(self) -> Iterable[str]:
        """Names of all tensors."""

    def info(self, name: str) -> Info:
        """Dtype and shape of a tensor."""

    def read(self, name: str, view: tuple[int, ...], box: tuple[slice, ...]) -> np.ndarray:
        """The tensor, reshaped to ``view``, within ``box`` (a slice with start and stop for each axis)."""


class Arrays:
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        """See ``TensorReader``."""
        return self._tensors.keys()

    def info(self, name: str) -> Info:
        """See ``TensorReader``."""
        return Info(self._tensors[name].dtype, self._tensors[name].shape)

    def read(self, name: str, view: tuple[int, ...], box: tuple[slice, ...]) -> np.ndarray:
        """See ``TensorReader``."""
        return self._tensors[name].reshape(view)[box]


class _Entry(NamedTuple):
    path: Path
    info: Info
    offset: int


class Directory:
    """The tensors of a Hugging Face directory; only headers are read until a tensor is asked for.

    Raises:
      ConfigError: if the directory holds no complete set of safetensors files, naming what is wrong.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        for path, expected in _shards(folder).items():
            found = read_header(path)
            for name in expected or ():
                if name not in found:
                    raise ConfigError(f"{folder / INDEX} says that {path.name} has {name!r}, which it has not")
            self._entries.update({name: entry for name, entry in found.items() if not expected or name in expected})
        self._open = functools.lru_cache(maxsize=64)(_OpenFile)

    def names(self) -> Iterable[str]:
        """See ``TensorReader``."""
        return self._entries.keys()

    def info(self, name: str) -> Info:
        """See ``TensorReader``."""
        return self._entries[name].info

    def read(self, name: str, view: tuple[int, ...], box: tuple[slice, ...]) -> np.ndarray:
        """See ``TensorReader``. Reads the bytes of the box alone, or the pages that they lie in."""
        entry = self._entries[name]
        return read_box(self._open(entry.path), entry.offset, entry.info.dtype, view, box)


def read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of one file: where each begins, its dtype and its shape.

    Raises:
      ConfigError: if it is no safetensors file, or is shorter than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES or 8 + length > size:
            raise ConfigError(f"{path} is no safetensors file, or is truncated: fetch it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(path, 8 + length, name, fields) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} has a header that cannot be read ({error}): fetch it again") from None
    end = max((e.offset + math.prod(e.info.shape) * e.info.dtype.itemsize for e in entries.values()), default=0)
    if end > size:
        raise ConfigError(
            f"{path} is truncated: it has {size:,} bytes and its header speaks of {end:,}; fetch it again"
        )
    return entries


def _entry(path: Path, data: int, name: str, fields: dict[str, Any]) -> _Entry:
    shape = tuple(int(n) for n in fields["shape"])
    begin, end = (int(n) for n in fields["data_offsets"])
    if fields["dtype"] not in DTYPES:
        raise ConfigError(
            f"{path}: {name!r} has dtype {fields['dtype']}, which is not read: convert it to one of {', '.join(DTYPES)}"
        )
    dtype = DTYPES[fields["dtype"]]
    if begin < 0 or any(n < 0 for n in shape) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ConfigError(f"{path}: {name!r} of shape {shape} does not fit its bytes {begin}..{end}: fetch it again")
    return _Entry(path, Info(dtype, shape), data + begin)


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint, and the tensors that the index says each has (None without an index)."""
    if (folder / UNFINISHED).exists():
        raise ConfigError(f"{folder} is an unfinished export: run the same launch.convert again, which goes on with it")
    if (folder / INDEX).exists():
        return {path: names for path, names in _indexed(folder).items()}
    files = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    if len(files) == 1 and "-of-" not in files[0].name:
        return {files[0]: None}
    if files:
        raise ConfigError(
            f"{folder} has {len(files)} safetensors files and no {INDEX}: fetch the index, or finish the export"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise ConfigError(
            f"{folder} holds PyTorch pickles, which can run any code and are never read: save it as safetensors"
        )
    raise ConfigError(f"{folder} holds no safetensors files")


def _indexed(folder: Path) -> dict[Path, set[str]]:
    try:
        names = json.loads((folder / INDEX).read_text())["weight_map"]
        pairs = [(str(tensor), str(file)) for tensor, file in names.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / INDEX} is no index of tensors ({error!r})") from None
    shards: dict[Path, set[str]] = {}
    for tensor, file in pairs:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(f"{folder / INDEX} names {file!r}, which is no safetensors file in {folder}")
        shards.setdefault(folder / file, set()).add(tensor)
    for path in shards:
        if not path.is_file():
            raise ConfigError(f"{path} is missing: {INDEX} puts tensors in it; fetch it")
    return shards


class _OpenFile:
    """A file that is closed when nobody holds it any more."""

    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        os.close(self._descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer from ``offset``."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer], offset)
            if not count:
                raise ConfigError(f"{self._path} became shorter while it was read")
            buffer, offset = buffer[count:], offset + count

    def mapped(self, offset: int, length: int) -> tuple[mmap.mmap, int]:
        """A mapping that holds ``length`` bytes from ``offset``, and where in it they begin."""
        before = offset % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(self._descriptor, length + before, access=mmap.ACCESS_READ, offset=offset - before)
        return mapping, before


def read_box(
    file: _OpenFile, offset: int, dtype: np.dtype, view: tuple[int, ...], box: tuple[slice, ...]
) -> np.ndarray:
    """A box of a row-major array of shape ``view`` that begins at byte ``offset``."""
    shape = tuple(part.stop - part.start for part in box)
    result = np.empty(shape, dtype)
    if not result.size:
        return result
    # The last axis that is not whole: along it, and all behind it, the box lies in one run.
    axis = max((i for i, (n, whole) in enumerate(zip(shape, view, strict=True)) if n < whole), default=0)
    strides = [math.prod(view[i + 1 :]) * dtype.itemsize for i in range(len(view))]
    run = shape[axis] * strides[axis] if view else dtype.itemsize
    if run < min(_LONG_RUN_BYTES, result.nbytes):
        # Many short runs, as of one device's columns: mapped, so that only their pages are read, and copied at once.
        mapping, begin = file.mapped(offset, math.prod(view) * dtype.itemsize)
        result[...] = np.ndarray(view, dtype, mapping, begin)[box]
        return result
    data = memoryview(result.reshape(-1).view(np.uint8))
    first = offset + sum(part.start * stride for part, stride in zip(box, strides, strict=True))
    for number, indices in enumerate(itertools.product(*(range(n) for n in shape[:axis]))):
        start = first + sum(index * stride for index, stride in zip(indices, strides, strict=False))
        file.read_into(data[number * run : (number + 1) * run], start)
    return result
