"""Which part of a mixture each row of the training stream comes from, by arithmetic on the row's number.

Row r takes the part whose stretch of [0, 1), cut up by the shares that hold at r, contains the fractional part of r
times the golden ratio. These points fill [0, 1) evenly over any run of rows, so a part is off its share by one or two
rows, however many are counted and wherever the counting starts; and nothing but r decides, so any row can be read at
any time. How many earlier rows a part had needs no loop over them where shares are constant: the points below an edge
are a sum of floors, which Euclid's algorithm gives.

Shapes: P parts, N rows, B rows of a block.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

# Points are fractions of 2^64, where products wrap around by themselves. Edges are kept to 53 bits, so that a double
# holds them and every comparison is exact.
_ONE = 2**64
_GOLDEN = 0x9E3779B97F4A7C15
_EDGE_BITS = 53
_BLOCK = 2**13
_CACHED_BLOCKS = 8


class Interleaving(grain.transforms.DatasetSelectionMap):
    """Row number to (part, index within the part); the indices of a part count up from 0 without gaps."""

    def __init__(self, shares: Callable[[np.ndarray], np.ndarray], changes: Sequence[int]):
        """Takes the shares as a function of the row.

        Args:
          shares: rows [N], int64, to the shares of the parts at those rows, [N, P]; each N sums to 1.
          changes: ascending rows. Before the first and from the last on, shares are constant, and also between two
            neighbours that have the same shares.
        """
        self._shares = shares
        at_changes = shares(np.asarray(changes, np.int64))
        self._num_parts = at_changes.shape[1]
        varies = [False, *np.any(at_changes[1:] != at_changes[:-1], axis=1).tolist(), False]
        self._stretches = list(zip([0, *changes], [*changes, sys.maxsize], varies, strict=True))
        self._block = functools.lru_cache(_CACHED_BLOCKS)(self._lay_out_block)
        self._count = functools.cache(self._count_one_by_one)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> tuple[int, int]:
        block, place = divmod(row, _BLOCK)
        parts_B, indices_B = self._block(block)
        return int(parts_B[place]), int(indices_B[place])

    def _lay_out_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Part of each row of a block, and its index in that part."""
        start = block * _BLOCK
        parts_B = self._parts(start, start + _BLOCK)
        indices_B = np.empty(_BLOCK, np.int64)
        for part, before in enumerate(self._rows_before(start)):
            mine = np.flatnonzero(parts_B == part)
            indices_B[mine] = before + np.arange(len(mine))
        return parts_B, indices_B

    def _parts(self, start: int, stop: int) -> np.ndarray:
        rows_N = np.arange(start, stop)
        points_N = (rows_N.astype(np.uint64) * np.uint64(_GOLDEN) >> np.uint64(64 - _EDGE_BITS)).astype(np.int64)
        return np.sum(points_N[:, None] >= self._edges(rows_N), axis=1)

    def _edges(self, rows: np.ndarray) -> np.ndarray:
        """Where each part but the last ends, in units of 2^-53, int64 [N, P - 1]."""
        return np.rint(np.cumsum(self._shares(rows), axis=1)[:, :-1] * 2.0**_EDGE_BITS).astype(np.int64)

    def _rows_before(self, row: int) -> np.ndarray:
        """Rows of each part before the first row of a block, [P]."""
        total = np.zeros(self._num_parts, np.int64)
        for start, stop, varies in self._stretches:
            stop = min(stop, row)
            if start >= stop:
                continue
            if varies:
                ends = [*range((start // _BLOCK + 1) * _BLOCK, stop, _BLOCK), stop]
                total += sum(self._count(*run) for run in zip([start, *ends], ends, strict=False))
            else:
                [edges] = self._edges(np.asarray([start], np.int64))
                below = [_points_below(int(edge) << (64 - _EDGE_BITS), start, stop) for edge in edges]
                total += np.diff(np.asarray(below, np.int64), prepend=0, append=stop - start)
        return total

    def _count_one_by_one(self, start: int, stop: int) -> np.ndarray:
        return np.bincount(self._parts(start, stop), minlength=self._num_parts)


def _points_below(edge: int, start: int, stop: int) -> int:
    """Rows from ``start`` to ``stop`` whose point is below ``edge``, at most 2^64."""
    first, count = start * _GOLDEN, stop - start
    # Each such row, and no other, passes a multiple of 2^64 between its point less the edge and its point.
    return _sum_of_floors(count, _GOLDEN, first) - _sum_of_floors(count, _GOLDEN, first - edge)


def _sum_of_floors(count: int, slope: int, offset: int) -> int:
    """Sum of floor((slope n + offset) / 2^64) over 0 <= n < count, as Euclid's algorithm goes."""
    total, modulus = 0, _ONE
    while count > 0:
        total += count * (count - 1) // 2 * (slope // modulus) + count * (offset // modulus)
        slope, offset = slope % modulus, offset % modulus
        count, offset = divmod(slope * count + offset, modulus)
        modulus, slope = slope, modulus
    return total
