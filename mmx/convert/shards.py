"""Writing sharded safetensors tensor by tensor, so that an interrupted writing goes on and none looks complete.

The shards, their headers and the index follow from names, dtypes and shapes, before a value is known. A shard is
written under another name and renamed when it is whole and on the disk; a mark in the directory says that it is
unfinished, and of what, until the index is written, which comes last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError
from mmx.convert.ahead import read_ahead
from mmx.convert.safetensors import DTYPE_NAMES, INDEX, SINGLE, UNFINISHED

_PARTIAL = ".partial"


class Spec(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard(NamedTuple):
    """One file and what is in it, in order."""

    file: str
    specs: tuple[Spec, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensors in it."""
        return sum(spec.nbytes for spec in self.specs)

    def header(self) -> bytes:
        """What stands before the tensors: the length of the JSON, and the JSON, padded to eight bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in self.specs:
            offsets = [offset, offset + spec.nbytes]
            entries[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": offsets,
            }
            offset = offsets[1]
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def plan_shards(specs: Sequence[Spec], shard_bytes: int) -> list[Shard]:
    """Fills shards in order, none beyond ``shard_bytes`` but where a single tensor is larger."""
    groups: list[list[Spec]] = []
    held = 0
    for spec in specs:
        if not groups or held + spec.nbytes > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(spec)
        held += spec.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


class ShardWriter:
    """Writes the shards of a plan into a directory, going on where an earlier writing of the same plan ended.

    Args:
      origin: says what is written; another one does not go on with what is there.

    Raises:
      ConfigError: if the directory holds something else.
    """

    def __init__(self, folder: Path, plan: Sequence[Shard], origin: str):
        self._folder, self._plan = folder, plan
        headers = hashlib.sha256(b"".join(shard.header() for shard in plan)).hexdigest()
        self._mark = json.dumps({"origin": origin, "plan": headers}) + "\n"
        mark = folder / UNFINISHED
        if mark.exists() and mark.read_text() != self._mark:
            raise ConfigError(
                f"{folder} holds an unfinished export of something else: remove it, or choose another target"
            )
        if not mark.exists() and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty: choose another target, or remove it")
        self._done = {shard.file for shard in plan if self._is_whole(shard)} if mark.exists() else set()

    @property
    def nbytes_left(self) -> int:
        """Bytes that are not written yet."""
        return sum(shard.nbytes for shard in self._plan if shard.file not in self._done)

    def begin(self) -> None:
        """Marks the directory as unfinished."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for partial in self._folder.glob(f"*{_PARTIAL}"):
            partial.unlink()
        _write_durably(self._folder / UNFINISHED, self._mark)

    def write(self, values: Callable[[Spec], np.ndarray], budget: int, progress: Callable[[int], None]) -> None:
        """Writes the shards that are missing.

        Args:
          values: makes a tensor; called on other threads, in the order of the plan.
          budget: most bytes of tensors that are made ahead.
          progress: called with the bytes of each tensor that was written.
        """
        missing = [shard for shard in self._plan if shard.file not in self._done]
        made = read_ahead(((spec.nbytes, lambda spec=spec: values(spec)) for s in missing for spec in s.specs), budget)
        for shard in missing:
            self._write_shard(shard, made, progress)

    def finish(self) -> None:
        """Writes the index, if there are several shards, and takes the mark away."""
        if len(self._plan) > 1:
            total = sum(shard.nbytes for shard in self._plan)
            weight_map = {spec.name: shard.file for shard in self._plan for spec in shard.specs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            partial = self._folder / (INDEX + _PARTIAL)
            _write_durably(partial, json.dumps(index, indent=2) + "\n")
            partial.rename(self._folder / INDEX)
        (self._folder / UNFINISHED).unlink()
        _sync(self._folder)

    def _is_whole(self, shard: Shard) -> bool:
        path, header = self._folder / shard.file, shard.header()
        if not path.is_file() or path.stat().st_size != len(header) + shard.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header

    def _write_shard(self, shard: Shard, made: Iterator[np.ndarray], progress: Callable[[int], None]) -> None:
        partial = self._folder / (shard.file + _PARTIAL)
        try:
            with partial.open("wb", buffering=0) as file:
                _write_all(file.fileno(), shard.header())
                for spec in shard.specs:
                    array = next(made)
                    if array.shape != spec.shape or array.dtype != spec.dtype:
                        raise ValueError(f"{spec.name} was made as {array.dtype}{array.shape}")
                    _write_all(file.fileno(), np.ascontiguousarray(array).view(np.uint8).reshape(-1))
                    progress(array.nbytes)
                os.fsync(file.fileno())
        except OSError:
            partial.unlink(missing_ok=True)  # Gives back what a full disk needs to be used at all.
            raise
        partial.rename(self._folder / shard.file)
        _sync(self._folder)


def _write_all(descriptor: int, data: bytes | np.ndarray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
