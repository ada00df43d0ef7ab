"""Entries of a mixture and what they come to."""

import numpy as np
import pytest

from mmx.config import ConfigError, DataConfig, MixturePoint
from mmx.data.mixture import BUCKETS, Mixture, Part, in_bucket

LENGTHS = {"books": [5, 50, 500, 700], "code": [5, 15, 40], "books_qa": [60, 600]}


def mixture(*entries: str, points: tuple[MixturePoint, ...] = ()) -> Mixture:
    config = DataConfig(path="data/x", mixture=entries, mixture_points=points, short_below=30, long_above=100)

    def tokens(part: Part) -> int:
        lengths = np.asarray(LENGTHS[part.source])
        return int(lengths[in_bucket(lengths, part.bucket, config)].sum())

    return Mixture(config, {name: name.endswith("_qa") for name in LENGTHS}, tokens)


def shares(found: Mixture, row: int = 0) -> dict[str, float]:
    return {str(part): pytest.approx(share) for part, share in zip(found.parts, found.shares([row])[0], strict=True)}


def test_every_length_is_in_one_bucket():
    config = DataConfig()
    lengths = np.asarray([1, 2**15 - 1, 2**15, 2**17, 2**17 + 1, 2**30])
    found = [in_bucket(lengths, bucket, config).tolist() for bucket in BUCKETS]
    assert [[list(row).index(True), sum(row)] for row in zip(*found, strict=True)] == [
        [0, 1],
        [0, 1],
        [1, 1],
        [1, 1],
        [2, 1],
        [2, 1],
    ]
    assert in_bucket(lengths, "", config).all()


def test_entries():
    assert shares(mixture()) == {"books": 1255 / 1315, "code": 60 / 1315}
    assert shares(mixture("code=3", "books=1")) == {"books": 0.25, "code": 0.75}
    assert shares(mixture("*/short=30", "*/medium=30", "*/long=40")) == {
        "books/short": 0.3 * 5 / 25,
        "code/short": 0.3 * 20 / 25,
        "books/medium": 0.3 * 50 / 90,
        "code/medium": 0.3 * 40 / 90,
        "books/long": 0.4,
    }
    # Synthetic sources are in no star, and entries for the same documents add up.
    assert shares(mixture("*/long=90", "books_qa/long=10")) == {"books/long": 0.9, "books_qa/long": 0.1}
    assert shares(mixture("*/long=50", "books/long=25", "code=25")) == {"books/long": 0.75, "code": 0.25}


def test_points_are_joined_by_lines():
    found = mixture(points=(MixturePoint(10, ("code=1",)), MixturePoint(20, ("code=30", "books/long=30"))))
    assert found.changes == [10, 20]
    for row, share in ((0, 0), (10, 0), (12, 0.1), (20, 0.5), (1000, 0.5)):
        assert shares(found, row) == {"books/long": share, "code": 1 - share}
    # Rows are counted by the tokens in them.
    rows = found.row_shares([20], fill=[0.5, 1.0])
    assert rows[0].tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("books/huge=1", "'books/huge=1' names no bucket: use short, medium, long"),
        ("books/=1", "names no bucket"),
        ("boks/long=1", "no source 'boks' in data/x; did you mean 'books'"),
        ("code/long=1", r"source 'code' has no document over 100 tokens \(data.long_above\)"),
        ("books=nan", "must be greater than 0"),
    ],
)
def test_mistakes_are_named(entry, sentence):
    with pytest.raises(ConfigError, match=sentence):
        mixture(entry)


def test_an_entry_stands_once():
    with pytest.raises(ConfigError, match="'code' is there twice"):
        mixture("code=1", "code=2")
