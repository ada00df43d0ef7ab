"""Which slices a rank holds, and rows in that order."""

import numpy as np
import pytest

from mmx.config import ConfigError
from mmx.parallel.sequence_layout import NAMES, SequenceLayout


def test_zigzag_pairs_early_slices_with_late_ones():
    np.testing.assert_array_equal(SequenceLayout("zigzag").slice_ids(4), [[0, 7], [1, 6], [2, 5], [3, 4]])
    np.testing.assert_array_equal(SequenceLayout("zigzag").permutation(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    np.testing.assert_array_equal(SequenceLayout("contiguous").slice_ids(3), [[0], [1], [2]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_every_token_has_one_place(name, ranks):
    layout, length = SequenceLayout(name), 320
    row, segment_ids = np.random.default_rng(0).normal(size=length), np.ones((1, length), int)
    order, back = (f(length, ranks, segment_ids).reshape(-1) for f in (layout.permutation, layout.inverse))
    np.testing.assert_array_equal(row[order][back], row)
    slice_ids = layout.slice_ids(ranks, segment_ids).reshape(ranks, layout.slices_per_rank(ranks))
    shares = row[order].reshape(*slice_ids.shape, -1)
    np.testing.assert_array_equal(shares, row.reshape(-1, shares.shape[-1])[slice_ids])
    if ranks == 1 or name == "contiguous":
        np.testing.assert_array_equal(order, np.arange(length))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="'striped' is not one of contiguous, zigzag, balanced"):
        SequenceLayout("striped")
    with pytest.raises(ConfigError, match="a row of 100 tokens cannot be cut into 8 equal slices for 4 ranks"):
        SequenceLayout("zigzag").permutation(100, 4)


def test_balanced_gives_each_rank_one_of_every_eight_neighbours():
    rng = np.random.default_rng(0)
    segment_ids = np.sort(rng.integers(0, 6, (3, 640)), axis=1)
    slice_ids = SequenceLayout("balanced").slice_ids(8, segment_ids)
    np.testing.assert_array_equal(np.sort(slice_ids, axis=1), np.broadcast_to(np.arange(64).reshape(8, 8).T, (3, 8, 8)))


def test_balanced_rows_have_their_own_order():
    segment_ids = np.sort(np.random.default_rng(0).integers(0, 6, (3, 640)), axis=1)
    layout = SequenceLayout("balanced")
    order, back = (f(640, 8, segment_ids) for f in (layout.permutation, layout.inverse))
    np.testing.assert_array_equal(np.take_along_axis(order, back, axis=1), np.tile(np.arange(640), (3, 1)))
    with pytest.raises(ValueError, match="needs the rows' segment ids"):
        layout.permutation(640, 8)
