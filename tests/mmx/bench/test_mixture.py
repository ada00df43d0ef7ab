"""The shares of Table 6 come out of the loader."""

import pytest

from mmx.bench.mixture import measure


def test_table_6_is_delivered():
    lines = []
    results = measure(300, lines.append)
    assert len(lines) == len(results) == 3
    for stage in results.values():
        assert sum(stage["percent"][bucket] for bucket in ("short", "medium", "long")) == pytest.approx(100)
        assert stage["largest_error"] < 0.5
        # A tenth of the last fifth; a row is a third of a percent.
        assert stage["percent"]["questions"] == pytest.approx(2, abs=0.5)
        assert stage["padding"] < 6
