"""Preparing data, and batches whose position is one number."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmx.config import ConfigError, DataConfig
from mmx.data.loader import PreparedData, Share
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


def test_an_epoch_reads_every_row_once(folder):
    data = PreparedData(config(folder, mixture=("right=1",), batch_size=1))
    from mmx.data.corpus import Corpus
    from mmx.data.packing import PackedRows

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
