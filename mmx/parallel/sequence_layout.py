"""Which tokens of a row each rank of the context axis holds.

A row is cut into equal slices, numbered in the order of the text, and every rank holds as many of them as any other,
in rising order. Rows are brought into this order on the host, once; on the devices only the numbers of the slices
matter: positions follow from them, and so does the order in which states are combined.

Shapes: B batch, P ranks, N slices a rank, T = P N slices, L tokens of a slice, S tokens of a row, S = T L.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mmx.config import SEQUENCE_LAYOUTS, ConfigError

NAMES = tuple(SEQUENCE_LAYOUTS)
# Tokens of the blocks in which work is reckoned; what attention uses depends on the platform.
_WORK_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """How slices are dealt to ranks.

    "contiguous" gives every rank one slice. "zigzag" gives rank r the slices r and 2P - 1 - r: under a causal mask over
    the whole row every rank has the same work. "balanced" gives every rank eight, by the work that the documents of
    this row make of them; the numbers of its slices are data that come with the row. With one rank all three are the
    row as it is.
    """

    name: str = "contiguous"

    def __post_init__(self):
        if self.name not in NAMES:
            raise ConfigError(f"the sequence layout {self.name!r} is not one of {', '.join(NAMES)}")

    @property
    def depends_on_documents(self) -> bool:
        """Whether rows differ in their slices, so that the numbers have to come with the rows."""
        return self.name == "balanced"

    def slices_per_rank(self, ranks: int) -> int:
        """N."""
        return SEQUENCE_LAYOUTS[self.name] if ranks > 1 else 1

    def slice_ids(self, ranks: int, segment_ids_BS: np.ndarray | None = None) -> np.ndarray:
        """The slices that each rank holds, int32 [P, N]; [B, P, N] in the balanced layout, which needs the documents.

        Raises:
          ConfigError: if rows cannot be cut into equal slices (balanced layout).
        """
        rank_P = np.arange(ranks, dtype=np.int32)
        if self.depends_on_documents:
            if segment_ids_BS is None:
                raise ValueError("the balanced layout needs the rows' segment ids")
            work_BT = _work(segment_ids_BS, self.slice_length(segment_ids_BS.shape[1], ranks))
            return np.stack([_deal(work_T, ranks) for work_T in work_BT])
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

    def permutation(self, length: int, ranks: int, segment_ids_BS: np.ndarray | None = None) -> np.ndarray:
        """int32 [S] such that ``row[permutation]`` lies in layout order: rank 0's tokens, then rank 1's, ...

        In the balanced layout, which needs the documents, [B, S]: one for each row.
        """
        slice_length = self.slice_length(length, ranks)
        ids = self.slice_ids(ranks, segment_ids_BS)
        first = ids.reshape(*ids.shape[:-2], -1, 1) * slice_length
        return (first + np.arange(slice_length, dtype=np.int32)).reshape(*ids.shape[:-2], length)

    def inverse(self, length: int, ranks: int, segment_ids_BS: np.ndarray | None = None) -> np.ndarray:
        """int32, of the same shape, that undoes ``permutation``."""
        return np.argsort(self.permutation(length, ranks, segment_ids_BS), axis=-1).astype(np.int32)


def _work(segment_ids_BS: np.ndarray, length: int) -> np.ndarray:
    """Blocks of keys that the blocks of queries of each slice look at, int64 [B, T].

    Whole blocks, as attention computes them: token by token, a slice of short documents would seem cheaper than it is.
    """
    B, S = segment_ids_BS.shape
    index = np.arange(S)
    begins = np.diff(segment_ids_BS, axis=1, prepend=segment_ids_BS[:, :1]) != 0
    document_BS = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    block = math.gcd(_WORK_BLOCK, length)
    work = index[::block] // block - document_BS[:, ::block] // block + 1
    return work.reshape(B, S // length, -1).sum(axis=-1)


def _deal(work_T: np.ndarray, ranks: int) -> np.ndarray:
    """Slices for each rank, [P, N]: one of each P neighbours, so that a document is spread over the ring's steps.

    Neighbours that differ most go first. Among them the one with most work goes to the rank that has least so far.
    """
    groups_NP = np.arange(len(work_T)).reshape(-1, ranks)
    spread_N = np.ptp(work_T[groups_NP], axis=1)
    load_P = np.zeros(ranks)
    dealt_PN = np.empty((ranks, len(groups_NP)), np.int32)
    for n in np.argsort(-spread_N, kind="stable"):
        heaviest_P = groups_NP[n][np.argsort(-work_T[groups_NP[n]], kind="stable")]
        idlest_P = np.argsort(load_P, kind="stable")
        dealt_PN[idlest_P, n] = heaviest_P
        load_P[idlest_P] += work_T[heaviest_P]
    return dealt_PN
