"""Part and index of every row, against counting them one by one."""

import numpy as np
import pytest

from mmx.data import interleave as interleave_module
from mmx.data.interleave import Interleaving

FIRST, SECOND, THIRD = [0.3, 0.7, 0.0], [0.35, 0.35, 0.3], [0.01, 0.0, 0.99]
POINTS = {
    "constant": [(0, FIRST)],
    "transition": [(100, FIRST), (700, SECOND)],
    "plateaus": [(0, FIRST), (400, FIRST), (440, SECOND), (1024, SECOND), (1025, THIRD)],
    "there and back": [(64, FIRST), (128, THIRD), (192, FIRST)],
    "jump between blocks": [(0, FIRST), (255, FIRST), (256, THIRD)],
}


@pytest.fixture(params=POINTS)
def shares(request, monkeypatch):
    """Shares as a function of the row, and the rows where they change; blocks so small that there are many."""
    monkeypatch.setattr(interleave_module, "_BLOCK", 64)
    rows, values = zip(*POINTS[request.param], strict=True)
    columns = np.asarray(values).T
    return lambda at: np.stack([np.interp(at, rows, column) for column in columns], axis=1), rows


def test_indices_of_a_part_have_no_gaps(shares):
    chosen = Interleaving(*shares)
    counts = [0, 0, 0]
    for row in range(2000):
        part, index = chosen[row]
        assert index == counts[part]
        counts[part] += 1


def test_random_access(shares):
    in_order = [Interleaving(*shares)[row] for row in range(0, 2000, 97)]
    chosen = Interleaving(*shares)
    for place in np.random.default_rng(0).permutation(len(in_order)):
        assert chosen[97 * int(place)] == in_order[place]


def test_any_run_of_rows_has_its_shares(shares):
    chosen = Interleaving(*shares)
    got = np.cumsum(np.eye(3)[[chosen[row][0] for row in range(2000)]], axis=0)
    want = np.cumsum(shares[0](np.arange(2000)), axis=0)
    # In rows; each change of the shares may add to it.
    assert np.abs(got - want).max() < 4
    for size in (10, 100, 1000):
        off = (got[size:] - got[:-size]) - (want[size:] - want[:-size])
        assert np.abs(off).max() < 4
        assert np.sqrt(np.mean(off**2)) < 1.2


def test_far_rows_are_found_without_counting_to_them():
    def shares(rows):
        return np.stack([np.full(len(rows), 1 / 3), np.full(len(rows), 2 / 3)], axis=1)

    row = 10**10
    part, index = Interleaving(shares, [0])[row]
    assert index == pytest.approx(row * (1 / 3, 2 / 3)[part], abs=5)
