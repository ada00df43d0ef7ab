"""Packed rows over a corpus, found by arithmetic instead of written to disk.

A layout says which pieces of which documents make row r; here they are read and become the arrays that a model trains
on. Any row can be read at any time, for any row length, so the position in the data is one number.

Shapes: S tokens of a row.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np

from mmx.data.corpus import Corpus
from mmx.data.layout import Layout, Piece, Stream, Whole


class Row(TypedDict):
    """One packed row, [S] each."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32, the next token of the same document, 0 where there is none
    segment_ids: np.ndarray  # int32, 1 for the first document in the row, 2 for the second, ...; 0 is padding
    positions: np.ndarray  # int32, from the start of the document's part in this row
    weights: np.ndarray  # fp32, 1 where there is a target that counts for the loss, else 0


ROW_DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "segment_ids": np.int32,
    "positions": np.int32,
    "weights": np.float32,
}


class PackedRows:
    """The rows of a corpus, as a random-access sequence.

    Every token but the first of each document is the target of at most one row, and of exactly one if the layout
    leaves nothing out. A row that is not full is padded.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequence_length: int,
        seed: int | None,
        *,
        documents: np.ndarray | None = None,
        whole: bool = False,
    ):
        """Lays the documents out.

        Args:
          corpus: the documents.
          sequence_length: S.
          seed: decides the order of the documents; None keeps the order on disk.
          documents: numbers of those that are read; None reads all.
          whole: True cuts no document that fits in a row (``Whole``), False cuts at every row's end (``Stream``).
        """
        self._corpus = corpus
        self._length = sequence_length
        chosen = np.arange(len(corpus)) if documents is None else documents
        if seed is not None:
            chosen = chosen[np.random.default_rng(seed).permutation(len(chosen))]
        lengths = np.asarray(corpus.lengths)[chosen]
        self._layout: Layout = (Whole if whole else Stream)(chosen, lengths, sequence_length)

    def __len__(self) -> int:
        return len(self._layout)

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold tokens; the rest is padding."""
        return self._layout.tokens / (len(self) * self._length)

    def __getitem__(self, row: int) -> Row:
        parts = [self._read(piece, number) for number, piece in enumerate(self._layout.pieces(row), 1)]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in ROW_DTYPES}
        # Padding is zero in every field.
        return {name: np.pad(values, (0, self._length - len(values))) for name, values in columns.items()}

    def _read(self, piece: Piece, segment: int) -> Row:
        """A piece as one segment of a row."""
        document, start, stop = piece
        # One token more than the piece, so that its last token has its target.
        tokens = self._corpus.read(document, start, min(stop + 1, int(self._corpus.lengths[document])))
        size, with_target = stop - start, len(tokens) - 1
        counted = self._corpus.counted(document, start + 1, start + 1 + with_target)
        values = {
            "tokens": tokens[:size],
            "targets": np.pad(tokens[1:], (0, size - with_target)),
            "segment_ids": np.full(size, segment),
            "positions": np.arange(size),
            "weights": np.pad(counted, (0, size - with_target)),
        }
        return {name: values[name].astype(dtype) for name, dtype in ROW_DTYPES.items()}
