"""Part and index of every row, against counting them one by one."""

import numpy as np
import pytest

from mmx.data.interleave import _BLOCK, Interleaving

FIRST, SECOND, THIRD = [0.3, 0.7, 0.0], [0.35, 0.35, 0.3], [0.01, 0.0, 0.99]
POINTS = {
    "constant": [(0, FIRST)],
    "short transition": [(100, FIRST), (700, SECOND)],
    "transition over blocks": [(100, FIRST), (2 * _BLOCK + 7, SECOND)],
    "plateaus": [(0, FIRST), (400, FIRST), (440, SECOND), (_BLOCK, SECOND), (_BLOCK + 1, THIRD)],
    "there and back": [(64, FIRST), (128, THIRD), (192, FIRST)],
    "jump between blocks": [(0, FIRST), (_BLOCK - 1, FIRST), (_BLOCK, THIRD)],
}
ROWS = 3 * _BLOCK


@pytest.fixture(params=POINTS)
def shares(request):
    """Shares as a function of the row, and the rows where they change."""
    rows, values = zip(*POINTS[request.param], strict=True)
    columns = np.asarray(values).T
    return lambda at: np.stack([np.interp(at, rows, column) for column in columns], axis=1), rows


def test_indices_of_a_part_have_no_gaps(shares):
    chosen = Interleaving(*shares)
    counts = [0, 0, 0]
    for row in range(ROWS):
        part, index = chosen[row]
        assert index == counts[part]
        counts[part] += 1


def test_random_access(shares):
    rows = range(0, ROWS, 9973)
    in_order = [Interleaving(*shares)[row] for row in rows]
    chosen = Interleaving(*shares)
    for place in np.random.default_rng(0).permutation(len(rows)):
        assert chosen[rows[place]] == in_order[place]


def test_any_run_of_rows_has_its_shares(shares):
    chosen = Interleaving(*shares)
    got = np.cumsum(np.eye(3)[[chosen[row][0] for row in range(ROWS)]], axis=0)
    want = np.cumsum(shares[0](np.arange(ROWS)), axis=0)
    assert np.abs(got - want).max() < 2.5  # rows, from the start, over three blocks
    for size in (1, 10, 100, 1000):
        off = (got[size:] - got[:-size]) - (want[size:] - want[:-size])
        assert np.abs(off).max() < 2
        assert np.sqrt(np.mean(off**2)) < 0.6


def test_far_rows_are_found_without_counting_to_them():
    def shares(rows):
        return np.stack([np.full(len(rows), 1 / 3), np.full(len(rows), 2 / 3)], axis=1)

    row = 10**9
    part, index = Interleaving(shares, [0])[row]
    assert index == pytest.approx(row * (1 / 3, 2 / 3)[part], rel=1e-5)
