"""Which tokens of a row each rank of the context axis holds.

A row is cut into equal slices, numbered in the order of the text, and every rank holds as many of them as any other,
in rising order. Rows are brought into this order on the host, once; on the devices only the numbers of the slices
matter: positions follow from them, and so does the order in which states are combined.

Shapes: B batch, P ranks, N slices a rank, L tokens of a slice, S tokens of a row, S = P N L.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mmx.config import ConfigError

NAMES = ("contiguous", "zigzag")


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """How slices are dealt to ranks.

    "contiguous" gives every rank one slice. "zigzag" gives rank r the slices r and 2P - 1 - r, so that under a causal
    mask over the whole row every rank has the same work. With one rank both are the row as it is.
    """

    name: str = "contiguous"

    def __post_init__(self):
        if self.name not in NAMES:
            raise ConfigError(f"the sequence layout {self.name!r} is not one of {', '.join(NAMES)}")

    def slices_per_rank(self, ranks: int) -> int:
        """N."""
        return 2 if self.name == "zigzag" and ranks > 1 else 1

    def slice_ids(self, ranks: int) -> np.ndarray:
        """The slices that each rank holds, int32 [P, N]."""
        rank_P = np.arange(ranks, dtype=np.int32)
        if self.slices_per_rank(ranks) == 1:
            return rank_P[:, None]
        return np.stack([rank_P, 2 * ranks - 1 - rank_P], axis=1)

    def slice_length(self, length: int, ranks: int) -> int:
        """L, for rows of ``length`` tokens.

        Raises:
          ConfigError: if the row cannot be cut into equal slices.
        """
        slices = ranks * self.slices_per_rank(ranks)
        if length % slices:
            raise ConfigError(
                f"a row of {length} tokens cannot be cut into {slices} equal slices for {ranks} ranks ({self.name} "
                f"layout): use a multiple of {slices}"
            )
        return length // slices

    def permutation(self, length: int, ranks: int) -> np.ndarray:
        """int32 [S] such that ``row[permutation]`` lies in layout order: rank 0's tokens, then rank 1's, ..."""
        tokens = np.arange(length, dtype=np.int32).reshape(-1, self.slice_length(length, ranks))
        return tokens[self.slice_ids(ranks).reshape(-1)].reshape(-1)

    def inverse(self, length: int, ranks: int) -> np.ndarray:
        """int32 [S] that undoes ``permutation``."""
        return np.argsort(self.permutation(length, ranks)).astype(np.int32)
