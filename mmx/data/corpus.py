"""Tokenized documents on disk: ArrayRecord shards and an index of document lengths.

A folder holds one split of one source. Each document is its text's tokens between the marks of its beginning and end,
cut into pieces of at most ``PIECE`` tokens, one record a piece, so that a window of a very long document reads no more
than the pieces under it. The index keeps only the documents' lengths: records follow from them. Where not every token
is to be learnt, a second file keeps the spans that are.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from mmx.config import ConfigError

PIECE = 2**13
SHARD_TOKENS = 2**27
_INDEX = "index.json"
_LENGTHS = "document_lengths.npy"
_COUNTED = "counted_spans.npy"
_CACHED_RECORDS = 256


def entry_of(folder: Path, name: str, said_by: Path) -> Path:
    """The path of a folder's entry that an index names.

    Raises:
      ConfigError: if the name leads out of the folder, or is none.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        raise ConfigError(f"{said_by} names {name!r}, which is not directly in {folder}: is it from someone you trust?")
    return folder / name


class CorpusWriter:
    """Writes documents one by one; ``close`` writes the index, without which the folder cannot be read."""

    def __init__(self, folder: Path, vocab_size: int):
        folder.mkdir(parents=True)
        self._folder = folder
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._lengths: list[int] = []
        self._spans: list[tuple[int, int, int]] = []
        self._with_spans = 0
        self._shards: list[dict[str, int | str]] = []
        self._writer: ArrayRecordWriter | None = None
        self._shard_tokens = 0

    def add(self, tokens: Sequence[int], counted: Sequence[tuple[int, int]] | None = None) -> None:
        """Appends a document, marks included.

        Args:
          tokens: of the document.
          counted: spans of the tokens that count for the loss, as (start, stop), to be given for all documents or none;
            None counts all tokens.
        """
        if counted is not None:
            self._spans += [(len(self._lengths), start, stop) for start, stop in counted]
            self._with_spans += 1
        array = np.asarray(tokens, self._dtype)
        if self._writer is None or self._shard_tokens >= SHARD_TOKENS:
            self._open_shard()
        for start in range(0, len(array), PIECE):
            self._writer.write(array[start : start + PIECE].tobytes())
            self._shards[-1]["records"] += 1
        self._lengths.append(len(array))
        self._shard_tokens += len(array)

    def close(self) -> dict[str, int]:
        """Finishes the shards and writes the index. Returns the number of documents and tokens."""
        self._close_shard()
        lengths = np.asarray(self._lengths, np.int64)
        np.save(self._folder / _LENGTHS, lengths)
        if self._with_spans not in (0, len(lengths)):
            raise ValueError(f"{self._with_spans} of {len(lengths)} documents have spans: give them for all or none")
        if self._with_spans:
            np.save(self._folder / _COUNTED, np.asarray(self._spans, np.int64).reshape(-1, 3))
        totals = {"documents": len(lengths), "tokens": int(lengths.sum())}
        index = {**totals, "piece": PIECE, "dtype": self._dtype.str, "shards": self._shards}
        index["counts_all"] = not self._with_spans
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
        return totals

    def _open_shard(self) -> None:
        self._close_shard()
        name = f"shard-{len(self._shards):05d}.array_record"
        # One record a group: reading a record decompresses nothing else.
        self._writer = ArrayRecordWriter(str(self._folder / name), "group_size:1")
        self._shards.append({"name": name, "records": 0})
        self._shard_tokens = 0

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            shard = self._shards[-1]
            shard["bytes"] = (self._folder / shard["name"]).stat().st_size


class Corpus:
    """Documents that a ``CorpusWriter`` wrote, by number, and any window of their tokens.

    Raises ConfigError on opening if the index or a shard is missing or has another size than when it was written.
    """

    def __init__(self, folder: Path):
        index_path = folder / _INDEX
        if not index_path.exists():
            raise ConfigError(f"{folder} holds no prepared documents: run launch.prepare, or correct data.path")
        index = json.loads(index_path.read_text())
        for shard in index["shards"]:
            path = entry_of(folder, shard["name"], index_path)
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
                raise ConfigError(f"{path} {state}: restore it or run launch.prepare again")
        try:
            self.lengths = np.load(folder / _LENGTHS, mmap_mode="r")
        except ValueError as error:  # No array, or Python objects, whose reading would run any code that they hold.
            raise ConfigError(f"{folder / _LENGTHS} holds no lengths ({error}): run launch.prepare again") from None
        self.tokens: int = index["tokens"]
        self._spans = self._load_spans(folder / _COUNTED) if not index.get("counts_all", True) else None
        self._piece: int = index["piece"]
        self._dtype = np.dtype(index["dtype"])
        pieces = -(-np.asarray(self.lengths) // self._piece)
        self._first_record = np.concatenate([[0], np.cumsum(pieces)])
        self._source = ArrayRecordDataSource([str(folder / shard["name"]) for shard in index["shards"]])
        # Neighbouring rows of a batch often lie in the same document.
        self._record = functools.lru_cache(_CACHED_RECORDS)(self._read_record)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document, int32."""
        first, last = start // self._piece, (stop - 1) // self._piece
        base = self._first_record[document]
        parts = [self._record(int(base + piece)) for piece in range(first, last + 1)]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return tokens[start - first * self._piece : stop - first * self._piece].astype(np.int32)

    @staticmethod
    def _load_spans(path: Path) -> np.ndarray:
        if not path.exists():
            raise ConfigError(f"{path} is missing: restore it or run launch.prepare again")
        return np.load(path)

    def counted(self, document: int, start: int, stop: int) -> np.ndarray:
        """Which of the tokens ``start`` to ``stop`` of a document count for the loss, bool."""
        counted = np.full(stop - start, self._spans is None)
        if self._spans is not None:
            first, last = np.searchsorted(self._spans[:, 0], [document, document + 1])
            for _, span_start, span_stop in self._spans[first:last]:
                counted[max(span_start - start, 0) : max(span_stop - start, 0)] = True
        return counted

    def _read_record(self, record: int) -> np.ndarray:
        return np.frombuffer(self._source[record], self._dtype)
