"""How much of a ring each rank has to compute, counted on the host.

Shapes: B batch, S tokens of a row, P ranks.
"""

from __future__ import annotations

import numpy as np

from mmx.parallel.sequence_layout import SequenceLayout
from pallas_kernels.softmax_attention.part import Places, visible_blocks


def block_pairs(segment_ids_BS: np.ndarray, ranks: int, layout: SequenceLayout, block: int) -> np.ndarray:
    """Pairs of blocks that ``ring_attention`` computes for these rows, forward, int64 [P, P]: by rank and step.

    The rows are worked on together, as the rows of one shard are: a block counts if any of them needs it.

    Args:
      segment_ids_BS: document ids, in the order of the text.
      block: tokens in a block.
    """
    B, S = segment_ids_BS.shape
    order = np.broadcast_to(layout.permutation(S, ranks, segment_ids_BS), (B, S))
    runs_BS = np.cumsum(np.diff(segment_ids_BS, axis=1, prepend=segment_ids_BS[:, :1]) != 0, axis=1)
    shares = [np.split(x, ranks, axis=1) for x in (order, np.take_along_axis(runs_BS, order, axis=1))]
    places = [Places(*share) for share in zip(*shares, strict=True)]

    pairs_PP = np.zeros((ranks, ranks), np.int64)
    for rank in range(ranks):
        for step in range(ranks):
            first, end = visible_blocks(places[rank], places[(rank - step) % ranks], block)
            pairs_PP[rank, step] = np.maximum(end - first, 0).sum()
    return pairs_PP


def busiest_over_mean(pairs_PP: np.ndarray) -> float:
    """Pairs of the rank with most of them over the ranks' mean: 1 is perfect balance."""
    total_P = pairs_PP.sum(axis=1)
    return float(total_P.max() / total_P.mean())


def steps_over_mean(pairs_PP: np.ndarray) -> float:
    """The same if all ranks waited for the slowest after every step; a real ring lies between the two."""
    return float(pairs_PP.max(axis=0).sum() / pairs_PP.sum(axis=1).mean())
