"""Packed rows over a corpus, found by arithmetic instead of written to disk.

The documents, in an order drawn from the seed, form one stream of tokens. Row r of length L covers stream positions
r * L to (r + 1) * L: documents follow each other without padding and a long one continues in the next row, as a new
segment. A row is found by a binary search among the documents' ends, so any row can be read at any time, for any L, and
the position in the data is one number.

Shapes: S tokens of a row.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from mmx.data.corpus import Corpus


class Row(TypedDict):
    """One packed row, [S] each."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32, the next token of the same document, 0 where there is none
    segment_ids: np.ndarray  # int32, 1 for the first document in the row, 2 for the second, ...; 0 is padding
    positions: np.ndarray  # int32, from the start of the document's part in this row
    weights: np.ndarray  # fp32, 1 where there is a target, else 0


ROW_DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "weights": np.float32,
}


class PackedRows:
    """The rows of a corpus, as a random-access sequence.

    Every token but the first of each document is the target of exactly one row. Tokens that do not fill a last row are
    left out, unless the whole corpus is shorter than a row, which is then padded.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, seed: int | None):
        """``seed`` decides the order of the documents; None keeps the order on disk."""
        self._corpus = corpus
        self._length = sequence_length
        count = len(corpus)
        self._order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
        self._ends = np.cumsum(np.asarray(corpus.lengths)[self._order])

    def __len__(self) -> int:
        return max(1, int(self._ends[-1]) // self._length)

    def __getitem__(self, row: int) -> Row:
        # One token more than the row, so that its last token has its target.
        start = row * self._length
        tokens, segments = self._stream(start, min(start + self._length + 1, int(self._ends[-1])))
        same = segments[1:] == segments[:-1]
        targets = np.where(same, tokens[1:], 0)
        inputs, segments = tokens[: self._length], segments[: self._length]
        first = np.concatenate([[True], segments[1:] != segments[:-1]])
        index = np.arange(len(inputs))
        positions = index - np.maximum.accumulate(np.where(first, index, 0))
        row = Row(tokens=inputs, targets=targets, segment_ids=segments, positions=positions, weights=same)
        return {name: self._pad(row[name], dtype) for name, dtype in ROW_DTYPES.items()}

    def _stream(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and segment ids (from 1) of a window of the stream."""
        tokens, segments = [], []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document_start = self._ends[place] - self._corpus.lengths[self._order[place]]
            end = min(stop, int(self._ends[place]))
            if end > start:
                window = int(start - document_start), int(end - document_start)
                tokens.append(self._corpus.read(int(self._order[place]), *window))
                segments.append(np.full(end - start, len(segments) + 1, np.int32))
            start, place = end, place + 1
        return np.concatenate(tokens), np.concatenate(segments)

    def _pad(self, values: np.ndarray, dtype: type) -> np.ndarray:
        """Cut or filled up with zeros, which mark padding in every field, to the row's length."""
        values = values[: self._length].astype(dtype)
        return np.pad(values, (0, self._length - len(values)))
