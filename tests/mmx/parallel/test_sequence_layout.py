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
    layout, length = SequenceLayout(name), 240
    row = np.random.default_rng(0).normal(size=length)
    order = layout.permutation(length, ranks)
    np.testing.assert_array_equal(row[order][layout.inverse(length, ranks)], row)
    shares = row[order].reshape(ranks, layout.slices_per_rank(ranks), -1)
    by_slice = row.reshape(-1, shares.shape[-1])
    np.testing.assert_array_equal(shares, by_slice[layout.slice_ids(ranks)])
    if ranks == 1 or name == "contiguous":
        np.testing.assert_array_equal(order, np.arange(length))


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="'striped' is not one of contiguous, zigzag"):
        SequenceLayout("striped")
    with pytest.raises(ConfigError, match="a row of 100 tokens cannot be cut into 8 equal slices for 4 ranks"):
        SequenceLayout("zigzag").permutation(100, 4)
