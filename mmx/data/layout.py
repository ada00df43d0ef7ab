"""Which pieces of which documents make a row: two ways to lay documents out in rows.

``Stream`` cuts the documents, one after the other, at every row's end: no padding, and what matters little where
documents are much shorter than a row. ``Whole`` cuts nothing that fits in a row: a document begins a row, or shares it
with others that fit beside it, and only one longer than a row is cut, into whole rows from its start and a rest. What
is left free is padding.

Shapes: S tokens of a row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Piece(NamedTuple):
    """Tokens ``start`` to ``stop`` of a document."""

    document: int
    start: int
    stop: int


class Layout(Protocol):
    """Rows of pieces; ``tokens`` counts those of all rows."""

    tokens: int

    def __len__(self) -> int: ...

    def pieces(self, row: int) -> list[Piece]:
        """What row ``row`` is made of, in order; at most S tokens."""
        ...


class Stream:
    """Row r covers tokens r S to (r + 1) S of the documents laid end to end.

    Found by a binary search among the documents' ends: no row depends on another. Tokens that do not fill a last row
    are left out, unless all of them are fewer than S.
    """

    def __init__(self, documents: np.ndarray, lengths: np.ndarray, sequence_length: int):
        """``documents`` are numbers, in the order in which they are read; ``lengths`` theirs in tokens."""
        self._documents, self._lengths, self._S = documents, lengths, sequence_length
        self._ends = np.cumsum(lengths)
        self.tokens = min(len(self) * sequence_length, int(self._ends[-1]))

    def __len__(self) -> int:
        return max(1, int(self._ends[-1]) // self._S)

    def pieces(self, row: int) -> list[Piece]:
        """Pieces of a row."""
        start = row * self._S
        stop = min(start + self._S, int(self._ends[-1]))
        found = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = min(stop, int(self._ends[place]))
            if end > start:
                begin = int(self._ends[place] - self._lengths[place])
                found.append(Piece(int(self._documents[place]), start - begin, end - begin))
            start, place = end, place + 1
        return found


class Whole:
    """Rows in which no document is cut that could be read in one piece.

    Of a document longer than S, piece i begins at its token i S; all but the last fill a row. The other pieces are
    packed best-fit decreasing (Ding et al., arXiv 2404.10830): longest first, each into the fullest row that still
    holds it. The longest piece comes first in its row.
    """

    # Free space of a row is kept in this many steps, so that finding a row takes the same time for any S.
    _STEPS = 4096

    def __init__(self, documents: np.ndarray, lengths: np.ndarray, sequence_length: int):
        """``documents`` are numbers, whose order decides between equally long ones; ``lengths`` theirs in tokens."""
        S = sequence_length
        counts = -(-lengths // S)
        owner = np.repeat(np.arange(len(documents)), counts)
        part = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._document = documents[owner]
        self._start = part * S
        self._stop = np.minimum(self._start + S, lengths[owner])
        sizes = self._stop - self._start
        rows = _best_fit_decreasing(sizes, S, -(-S // self._STEPS))
        # Pieces by row, the longest first.
        self._order = np.lexsort((-sizes, rows))
        self._first = np.searchsorted(rows[self._order], np.arange(rows.max() + 2))
        self.tokens = int(lengths.sum())

    def __len__(self) -> int:
        return len(self._first) - 1

    def pieces(self, row: int) -> list[Piece]:
        """Pieces of a row."""
        mine = self._order[self._first[row] : self._first[row + 1]]
        return [Piece(int(self._document[n]), int(self._start[n]), int(self._stop[n])) for n in mine]


def _best_fit_decreasing(sizes: np.ndarray, capacity: int, step: int) -> np.ndarray:
    """Row of each piece, rows numbered from 0. Free space counts in whole steps, which wastes less than one a piece."""
    rows = np.empty(len(sizes), np.int64)
    steps = -(-sizes // step)
    whole = capacity // step
    with_free: list[list[int]] = [[] for _ in range(whole + 1)]  # Rows by free steps; the last one opened comes first.
    has_rows = 0  # Bit n: some row has n free steps.
    opened = 0
    for piece in np.argsort(-sizes, kind="stable"):
        need = int(steps[piece])
        fitting = has_rows >> need << need
        if need <= whole and fitting:
            free = (fitting & -fitting).bit_length() - 1
            row = with_free[free].pop()
            if not with_free[free]:
                has_rows ^= 1 << free
        else:
            free, row = max(whole, need), opened
            opened += 1
        rows[piece] = row
        left = free - need
        if left:
            with_free[left].append(row)
            has_rows |= 1 << left
    return rows
