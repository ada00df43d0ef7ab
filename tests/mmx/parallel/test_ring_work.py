"""Counts of a ring's work against the mask itself, and the balance that the layouts give."""

import numpy as np
import pytest

from mmx.bench.parallel.packed import mixed_rows
from mmx.parallel.ring_work import block_pairs, busiest_over_mean, steps_over_mean
from mmx.parallel.sequence_layout import NAMES, SequenceLayout
from tests.mmx.parallel.rows import LENGTH, SEGMENTS


def pairs_of_the_mask(segment_ids, ranks, layout, block):
    """Pairs of blocks of one row in which any query sees any key, [P, P] by rank and step."""
    index = np.arange(LENGTH)
    runs = np.cumsum(np.diff(segment_ids, prepend=segment_ids[:1]) != 0)
    mask = (index <= index[:, None]) & (runs == runs[:, None])
    order = layout.permutation(LENGTH, ranks, segment_ids[None]).reshape(-1)
    blocks = mask[order][:, order].reshape(LENGTH // block, block, LENGTH // block, block).any(axis=(1, 3))
    per_rank = LENGTH // block // ranks
    by_source = blocks.reshape(ranks, per_rank, ranks, per_rank).sum(axis=(1, 3))
    return np.array([[by_source[rank, (rank - step) % ranks] for step in range(ranks)] for rank in range(ranks)])


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_mask(name):
    layout, ranks, block = SequenceLayout(name), 4, 3
    for rows in SEGMENTS.values():
        for row in rows:
            want = pairs_of_the_mask(row, ranks, layout, block)
            np.testing.assert_array_equal(block_pairs(row[None], ranks, layout, block), want)


def test_rows_of_a_batch_are_worked_on_together():
    rows = SEGMENTS["one beside many"]
    both = block_pairs(rows, 4, SequenceLayout("contiguous"), 6)
    np.testing.assert_array_equal(both, block_pairs(rows[:1], 4, SequenceLayout("contiguous"), 6))


def test_one_document():
    rows = np.ones((1, 4096), int)
    balance = {name: busiest_over_mean(block_pairs(rows, 8, SequenceLayout(name), 32)) for name in NAMES}
    # The last of eight ranks does 15/8 of the mean.
    assert balance["contiguous"] == pytest.approx(15 / 8, rel=0.1)
    assert balance["zigzag"] == balance["balanced"] == 1
    assert steps_over_mean(block_pairs(rows, 8, SequenceLayout("zigzag"), 32)) < 1.05


def test_documents_of_mixed_length():
    found = {name: [] for name in NAMES}
    for row in mixed_rows(20, 2**16, shortest=2**6, longest=2**14):
        for name in NAMES:
            found[name].append(block_pairs(row[None], 8, SequenceLayout(name), 512))
    busiest = {name: max(map(busiest_over_mean, pairs)) for name, pairs in found.items()}
    assert busiest["balanced"] < 1.1 < 2 < busiest["zigzag"]
    steps = {name: np.mean([steps_over_mean(x) for x in pairs]) for name, pairs in found.items()}
    assert steps["balanced"] < 1.5 < steps["contiguous"] < steps["zigzag"]


def test_documents_are_skipped():
    lengths = np.full(64, 512)
    row = np.repeat(np.arange(64), lengths)[None]
    packed, whole = (block_pairs(x, 8, SequenceLayout("contiguous"), 128).sum() for x in (row, np.zeros_like(row)))
    # 4 blocks a document: 10 pairs each, against 256 blocks in one.
    assert (packed, whole) == (64 * 10, 256 * 257 // 2)
