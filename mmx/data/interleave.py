"""Which part of a mixture each row of the training stream comes from, by arithmetic on the row's number.

Rows are dealt out in blocks. A part's quota in a block is its shares there, summed and rounded; the n-th row of a quota
is due where the sum of the shares reaches n + 1/2, and the parts' rows follow each other as they are due. So a part is
off its share by about one row, over any run of rows. How many rows a part had before a block is a sum of quotas, which
are the same wherever shares are constant: any row can be found without the ones before it.

Shapes: P parts, N rows, B rows of a block.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

# Quotas are off by half a row at most, a share of 10^-5.
_BLOCK = 2**16
_CACHED_BLOCKS = 4
# Steps of a row in which due times are compared, so that equal ones stay equal whatever the rounding of sums.
_DUE_STEPS = 2**20


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
        self._changes = np.asarray(changes, np.int64)
        at_changes = shares(self._changes)
        self._varies = [False, *np.any(at_changes[1:] != at_changes[:-1], axis=1).tolist(), False]
        self._block = functools.lru_cache(_CACHED_BLOCKS)(self._deal)
        self._quotas = functools.cache(self._round_shares)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> tuple[int, int]:
        block, place = divmod(row, _BLOCK)
        parts_B, indices_B = self._block(block)
        return int(parts_B[place]), int(indices_B[place])

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Part of each row of a block, and its index in that part."""
        quotas_P, before_P = self._quotas(block), self._rows_before(block)
        sums_BP = np.pad(np.cumsum(self._block_shares(block), axis=0), ((1, 0), (0, 0)))
        edges_B = np.arange(_BLOCK + 1)
        due, parts, indices = [], [], []
        for part, quota in enumerate(quotas_P):
            nth = np.arange(quota)
            reached = (nth + 0.5) * (sums_BP[-1, part] / max(quota, 1))
            due.append(np.rint(np.interp(reached, sums_BP[:, part], edges_B) * _DUE_STEPS).astype(np.int64))
            parts.append(np.full(quota, part))
            indices.append(before_P[part] + nth)
        order = np.argsort(np.concatenate(due), kind="stable")
        return np.concatenate(parts)[order], np.concatenate(indices)[order]

    def _rows_before(self, block: int) -> np.ndarray:
        """Rows of each part in all blocks before one, [P]."""
        total = np.zeros_like(self._quotas(block))
        for stretch, run in itertools.groupby(range(block), self._constant_stretch):
            blocks = list(run)
            if stretch is None:
                total += sum(map(self._quotas, blocks))
            else:
                total += len(blocks) * self._quotas(blocks[0])
        return total

    def _constant_stretch(self, block: int) -> int | None:
        """Number of the stretch of constant shares that a block lies in; None if it lies in none."""
        first, last = np.searchsorted(self._changes, [block * _BLOCK, (block + 1) * _BLOCK - 1], side="right").tolist()
        return None if first != last or self._varies[first] else first

    def _round_shares(self, block: int) -> np.ndarray:
        """Rows of each part in a block, int64 [P]: summed shares, the largest remainders rounded up."""
        sums_P = self._block_shares(block).sum(axis=0)
        quotas_P = np.floor(sums_P).astype(np.int64)
        up = np.argsort(quotas_P - sums_P, kind="stable")[: _BLOCK - quotas_P.sum()]
        quotas_P[up] += 1
        return quotas_P

    def _block_shares(self, block: int) -> np.ndarray:
        return self._shares(block * _BLOCK + np.arange(_BLOCK, dtype=np.int64))
