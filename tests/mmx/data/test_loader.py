"""Preparing data, and batches whose position is one number."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmx.config import ConfigError, DataConfig, MixturePoint
from mmx.data.corpus import Corpus, CorpusWriter
from mmx.data.loader import PreparedData, Share
from mmx.data.packing import PackedRows
from mmx.data.prepare import is_held_out, prepare
from mmx.data.sources import Source
from mmx.data.tokenizer import Tokenizer


def quiet(message: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two prepared sources that can be told apart by their words, one three times the size of the other."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, words, count in (("left", ["aaa", "bbb"], 90), ("right", ["yyy", "zzz"], 30)):
        with (root / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                file.write(json.dumps({"text": " ".join(rng.choice(words, 40))}) + "\n")
    sources = [Source(name, root / f"{name}.jsonl") for name in ("left", "right")]
    report = prepare(sources, root / "out", tokenizer=None, vocab_size=270, heldout_fraction=0.1, progress=quiet)
    assert report == json.loads((root / "out" / "dataset.json").read_text())
    assert not (root / "out.partial").exists()
    return root / "out"


def config(folder: Path, **changes) -> DataConfig:
    values = {"path": str(folder), "sequence_length": 16, "batch_size": 8, "heldout_sequences": 12}
    return DataConfig(**values | changes)


def batches(data: PreparedData, count: int, *, start: int = 0, share: Share = Share(), seed: int = 0) -> list[dict]:  # noqa: B008
    iterator = data.training_batches(seed, share)
    iterator.set_state({"global_next_index": start})
    return [next(iterator) for _ in range(count)]


def rows(parts: list[dict]) -> np.ndarray:
    return np.concatenate([part["tokens"] for part in parts])


def test_documents_are_split_by_name():
    held = [is_held_out(f"file{n}.py", 0.2) for n in range(2000)]
    assert 300 < sum(held) < 500
    assert held == [is_held_out(f"file{n}.py", 0.2) for n in range(2000)]


def test_splits_hold_every_document_once(folder):
    report = json.loads((folder / "dataset.json").read_text())
    for name, total in (("left", 90), ("right", 30)):
        splits = report["sources"][name]
        assert splits["train"]["documents"] + splits["heldout"]["documents"] == total
        assert splits["heldout"]["documents"] > 0


def test_same_seed_same_batches(folder):
    data = PreparedData(config(folder))
    np.testing.assert_array_equal(rows(batches(data, 5)), rows(batches(PreparedData(config(folder)), 5)))
    assert (rows(batches(data, 5)) != rows(batches(data, 5, seed=1))).any()


def test_position_survives_another_batch_size_and_process_count(folder):
    want = rows(batches(PreparedData(config(folder)), 6))
    # Two batches of 8, then one of 32 read by four processes.
    data = PreparedData(config(folder, batch_size=32))
    parts = [batches(data, 1, start=16, share=Share(n, 4))[0]["tokens"] for n in range(4)]
    got = np.stack(parts, axis=1).reshape(32, 16)
    np.testing.assert_array_equal(got, want[16:48])


def test_state_is_one_number(folder):
    iterator = PreparedData(config(folder)).training_batches(0, Share())
    for _ in range(3):
        next(iterator)
    assert iterator.get_state() == {"global_next_index": 24}
    json.dumps(iterator.get_state())


def test_mixture_is_delivered(folder):
    def share_of_left(**changes) -> float:
        data = PreparedData(config(folder, **changes))
        text = [data.tokenizer.decode(row) for row in rows(batches(data, 50))]
        return float(np.mean(["a" in row or "b" in row for row in text]))

    assert share_of_left(mixture=("left=0.2", "right=0.8")) == pytest.approx(0.2, abs=0.01)
    assert share_of_left(mixture=("right=1",)) == 0
    # By default sources weigh as many tokens as they have.
    report = json.loads((folder / "dataset.json").read_text())["sources"]
    tokens = {name: part["train"]["tokens"] for name, part in report.items()}
    assert share_of_left() == pytest.approx(tokens["left"] / sum(tokens.values()), abs=0.02)


def test_shares_move_along_the_stream(folder):
    points = (MixturePoint(100, ("left=1",)), MixturePoint(300, ("left=1", "right=3")))
    data = PreparedData(config(folder, mixture_points=points, batch_size=4))

    def is_left(row: np.ndarray) -> bool:
        text = data.tokenizer.decode(row)
        return "a" in text or "b" in text

    whole = rows(batches(data, 125))
    left = np.asarray([is_left(row) for row in whole])
    assert left[:100].all()
    assert left[100:300].mean() == pytest.approx((1 + 0.25) / 2, abs=0.02)
    assert left[100:200].mean() == pytest.approx(1 - 0.75 / 4, abs=0.03)
    assert left[300:].mean() == pytest.approx(0.25, abs=0.02)
    # The position stays one number: two processes go on in the middle of it with another batch size.
    elsewhere = PreparedData(config(folder, mixture_points=points, batch_size=10))
    halves = [batches(elsewhere, 10, start=148, share=Share(n, 2)) for n in range(2)]
    got = np.stack([rows(half) for half in halves], axis=1).reshape(-1, 16)
    np.testing.assert_array_equal(got, whole[148:248])


def test_a_part_is_read_whole_before_it_repeats(folder):
    points = (MixturePoint(0, ("left=3", "right=1")), MixturePoint(400, ("left=1", "right=2")))
    data = PreparedData(config(folder, mixture_points=points))
    packed = PackedRows(Corpus(folder / "right" / "train"), 16, seed=1)
    want = sorted(tuple(packed[n]["tokens"]) for n in range(len(packed)))
    got = [tuple(row) for row in rows(batches(data, 70)) if {*"yz"} & {*data.tokenizer.decode(row)}]
    assert len(got) > len(want)
    assert sorted(got[: len(want)]) == want


def test_passes_over_a_part(folder):
    points = (MixturePoint(0, ("left=3", "right=1")), MixturePoint(400, ("left=1", "right=2")))
    data = PreparedData(config(folder, mixture_points=points))
    report = json.loads((folder / "dataset.json").read_text())["sources"]
    tokens = {name: part["train"]["tokens"] for name, part in report.items()}
    read = rows(batches(data, 50))
    of_right = [row for row in read if {*"yz"} & {*data.tokenizer.decode(row)}]
    got = {str(part): times for part, times in data.passes(400).items()}
    assert got["right"] == pytest.approx(len(of_right) * 16 / tokens["right"], rel=0.02)
    assert got["left"] == pytest.approx((400 - len(of_right)) * 16 / tokens["left"], rel=0.02)


def test_buckets(folder, tmp_path):
    """Rows of a bucket hold its documents and no others; those that are not short are cut only by a row's length."""
    lengths = np.asarray([10, 40, 41, 70, 100, 130, 201, 7, 64, 99])
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "dataset.json").write_text(json.dumps({"sources": {"all": {}}}))
    writer = CorpusWriter(tmp_path / "all" / "train", 270)
    for number, length in enumerate(lengths):
        writer.add([number] * length)  # Every token says which document it is of.
    writer.close()
    bounds = {"short_below": 41, "long_above": 99, "sequence_length": 64, "batch_size": 1}
    for bucket, inside in (
        ("short", lengths < 41),
        ("medium", (lengths >= 41) & (lengths <= 99)),
        ("long", lengths > 99),
    ):
        for entry in (f"all/{bucket}=1", f"*/{bucket}=1"):
            parts = [
                row["tokens"][0][row["segment_ids"][0] == segment]
                for row in batches(PreparedData(config(tmp_path, mixture=(entry,), **bounds)), 40)
                for segment in range(1, row["segment_ids"].max() + 1)
            ]
            assert {int(part[0]) for part in parts} == set(np.flatnonzero(inside))
            if bucket != "short":
                assert all(len(part) in (64, lengths[part[0]] % 64) for part in parts)
                assert {int(part[0]) for part in parts if len(part) == min(64, lengths[part[0]])} == set(
                    np.flatnonzero(inside)
                )


def test_an_epoch_reads_every_row_once(folder):
    data = PreparedData(config(folder, mixture=("right=1",), batch_size=1))
    packed = PackedRows(Corpus(folder / "right" / "train"), 16, seed=0)
    want = sorted(tuple(packed[n]["tokens"]) for n in range(len(packed)))
    first = [tuple(row) for row in rows(batches(data, len(packed)))]
    second = [tuple(row) for row in rows(batches(data, len(packed), start=len(packed)))]
    assert sorted(first) == want
    assert sorted(second) == want
    assert first != second


def test_heldout_rows_are_the_same_for_any_split(folder):
    data = PreparedData(config(folder))
    whole = list(data.heldout_batches(Share()))
    assert [batch["tokens"].shape for batch in whole] == [(8, 16), (8, 16)]
    assert whole[1]["weights"][4:].sum() == 0  # 12 rows, then filling.
    halves = [list(data.heldout_batches(Share(n, 2))) for n in range(2)]
    for number, batch in enumerate(whole):
        together = np.stack([half[number]["tokens"] for half in halves], axis=1).reshape(8, 16)
        np.testing.assert_array_equal(together, batch["tokens"])
    assert list(PreparedData(config(folder, heldout_sequences=0)).heldout_batches(Share())) == []


def test_mistakes_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no prepared data: run python -m launch\.prepare"):
        PreparedData(config(tmp_path))
    with pytest.raises(ConfigError, match=r"no source 'lef' in .*did you mean 'left'"):
        PreparedData(config(folder, mixture=("lef=1",)))
    with pytest.raises(ConfigError, match="must read source=weight"):
        PreparedData(config(folder, mixture=("left",)))
    with pytest.raises(ConfigError, match="must be greater than 0"):
        PreparedData(config(folder, mixture=("left=0",)))
    source = Source("left", folder.parent / "left.jsonl")
    common = {"tokenizer": None, "vocab_size": 270, "progress": quiet}
    with pytest.raises(ConfigError, match="exists: remove it"):
        prepare([source], folder, heldout_fraction=0.1, **common)
    with pytest.raises(ConfigError, match="must be between 0 and 1"):
        prepare([source], tmp_path / "x", heldout_fraction=1.5, **common)
    with pytest.raises(ConfigError, match="two sources share a name"):
        prepare([source, source], tmp_path / "x", heldout_fraction=0.1, **common)
    with pytest.raises(ConfigError, match="none for the heldout split"):
        prepare([source], tmp_path / "x", heldout_fraction=1e-9, **common)
    assert not (tmp_path / "x").exists()


def test_tokenizer_can_be_given(folder, tmp_path):
    source = Source("left", folder.parent / "left.jsonl")
    prepare(
        [source],
        tmp_path / "x",
        tokenizer=folder / "tokenizer.json",
        vocab_size=0,
        heldout_fraction=0.1,
        progress=quiet,
    )
    given = Tokenizer.load(tmp_path / "x" / "tokenizer.json")
    assert given.encode("aaa bbb") == Tokenizer.load(folder / "tokenizer.json").encode("aaa bbb")
