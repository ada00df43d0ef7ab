"""A run in stages of different lengths, meshes and batches: nothing is lost between them, and it resumes anywhere."""

import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mmx.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Phase,
    Run,
    Stage,
    TrainConfig,
)
from mmx.pretrained import load
from mmx.train.batch_size import BatchGrowth
from mmx.train.console import Console
from mmx.train.goodput import WAYS
from mmx.train.leg import Leg
from mmx.train.loop import train
from mmx.train.metrics import METRICS, read_metrics
from mmx.train.position_loss import describe_position_losses, position_ranges, read_position_losses
from mmx.train.report import write_report
from tests.tiny import tiny
from tests.words import VOCAB_SIZE, prepare_words

# What depends on the clock.
TIMES = ("tokens_per_second", "data_wait", "goodput", "time", "starts", *(f"seconds_{way}" for way in WAYS))
MARK = 5.55


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepare_words(tmp_path_factory.mktemp("words"))


def config(data: Path, **changes) -> Run:
    """Seven steps in which the batch doubles; then rows of twice the length, on another mesh."""
    first = Stage(
        "first",
        steps=7,
        sequence_length=32,
        batch_size=8,
        micro_batches=2,
        mesh=MeshConfig(replica=2, fsdp=2, tensor=2),
        schedule=(Phase("linear", 1.0, steps=5), Phase("constant", 1.0)),
        heldout_sequences=0,
        batch_marks=(MARK,),
    )
    second = Stage(
        "second",
        tokens=4 * 64 * 4,
        sequence_length=64,
        batch_size=4,
        mesh=MeshConfig(context=2, fsdp=4),
        rope_base=50_000.0,
        schedule=(Phase("linear", 0.1, steps=4),),
        heldout_sequences=0,
    )
    values = {
        "model": tiny(vocab_size=VOCAB_SIZE, num_layers=2, layer_pattern=("lightning", "softmax")),
        "data": DataConfig(path=str(data)),
        "optimizer": OptimizerConfig(peak_lr=1e-2),
        "train": TrainConfig(steps=0, log_every=1, batch_smoothing=2, batch_patience=2, position_sequences=4),
        "checkpoint": CheckpointConfig(every=100, keep=5),
        "stages": (first, second),
    }
    return Run(**values | changes)


def rows(workdir: Path) -> list[dict]:
    """What every start of the same run writes alike."""
    found = [row for row in read_metrics(workdir) if "event" not in row]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("stages")
    said = io.StringIO()
    assert train(config(data), workdir, Console(stream=said)).step == 11
    assert "stage second: 64 tokens a row, RoPE base 50000" in said.getvalue()
    assert "warning" not in said.getvalue()
    return workdir


def test_each_stage_has_its_own_length_batch_and_rates(finished):
    steps = [row for row in rows(finished) if "loss" in row]
    assert [row["stage"] for row in steps] == ["first"] * 7 + ["second"] * 4
    np.testing.assert_allclose([row["learning_rate"] for row in steps[:5]], np.arange(1, 6) * 2e-3)
    # Straight down from where the first stage ended.
    np.testing.assert_allclose([row["learning_rate"] for row in steps[7:]], [7.75e-3, 5.5e-3, 3.25e-3, 1e-3])
    assert [row["tokens"] for row in steps[7:]] == [steps[6]["tokens"] + 256 * n for n in (1, 2, 3, 4)]
    model = load(finished)
    assert model.config.rope_base == 50_000
    assert load(finished / "checkpoints" / "7").config.rope_base == tiny().rope_base


def test_batch_doubles_where_the_loss_crosses_the_mark(finished):
    steps = [row for row in rows(finished) if row.get("stage") == "first" and "loss" in row]
    growth, expected = BatchGrowth((MARK,), smoothing=2, patience=2), []
    for row in steps:
        expected.append(256 * 2 ** growth.doublings(row["step"]))
        growth.observe(row["step"], row["loss"])
    assert [row["batch_tokens"] for row in steps] == expected
    assert set(expected) == {256, 512}
    assert [row["tokens"] for row in steps] == np.cumsum(expected).tolist()
    assert all("gradient_variance" in row for row in steps)


class StopAt(Console):
    """Says nothing, and sends this process SIGTERM when it is to say something."""

    def __init__(self, words: str):
        super().__init__(speaks=False)
        self._words = words

    def say(self, message: str) -> None:
        if self._words in message:
            signal.raise_signal(signal.SIGTERM)

    progress = say


def arrays(workdir: Path, step: int) -> list[np.ndarray]:
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        saved = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return [np.asarray(x) for x in jax.tree.leaves(saved["state"])]


@pytest.mark.parametrize(
    "words",
    [
        ("first: step 1",),
        # As its batch grows, at the boundary, and in the second stage.
        ("512 tokens a step", "stage second", "second: step 8"),
    ],
    ids=["in the first stage", "three times"],
)
def test_resumed_run_equals_one_left_alone(data, finished, tmp_path, words):
    for word in words:
        assert train(config(data), tmp_path, StopAt(word)).stopped_by == signal.SIGTERM
    assert train(config(data), tmp_path, Console(speaks=False)).step == 11
    assert rows(tmp_path) == rows(finished)
    assert read_position_losses(tmp_path) == read_position_losses(finished)
    for a, b in zip(arrays(tmp_path, 11), arrays(finished, 11), strict=True):
        np.testing.assert_array_equal(a, b)


def test_changing_the_mesh_between_stages_changes_no_number(data, finished, tmp_path):
    run = config(data)
    same = dataclasses.replace(run.stages[1], mesh=run.stages[0].mesh)
    run = dataclasses.replace(run, stages=(run.stages[0], same))
    train(run, tmp_path, Console(speaks=False))
    losses = [[row["loss"] for row in rows(workdir) if "loss" in row] for workdir in (tmp_path, finished)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_loss_by_position_before_and_after(finished):
    saved = read_position_losses(finished)
    assert saved["position_below"] == [64]
    assert position_ranges(1000).tolist() == [64, 128, 256, 512, 1000]
    labels = [(entry["label"], entry["step"], entry["rope_base"]) for entry in saved["measurements"]]
    assert labels == [("before", 0, 10_000.0), ("first", 7, 10_000.0), ("second", 11, 50_000.0)]
    losses = [entry["loss"][0] for entry in saved["measurements"]]
    assert losses[2] < losses[1] < losses[0]
    assert describe_position_losses(saved).startswith(f"{losses[0]:.4f} to {losses[2]:.4f} nats")


def test_the_difference_by_position_is_that_of_all_tokens_and_of_the_farthest():
    losses = ([5.0, 4.0, 3.0, None], [4.0, 3.0, 1.0, None])
    saved = {
        "position_below": [64, 128, 256, 512],
        "target_tokens": [10, 20, 10, 0],
        "measurements": [{"loss": loss} for loss in losses],
    }
    said = describe_position_losses(saved)
    assert said == "4.0000 to 2.7500 nats a token on the same rows, 3.0000 to 1.0000 from position 128 on"


def test_report_compares_held_out_losses_within_a_stage_only(finished, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    held_out = [(0, "first", 3.0), (7, "first", 2.4), (11, "second", 1.5)]
    measured = [
        {"step": step, "tokens": step, "stage": stage, "heldout_loss": bits, "heldout_bits_per_byte": bits}
        for step, stage, bits in held_out
    ]
    lines = [json.dumps(row) for row in (*read_metrics(finished), *measured)]
    (tmp_path / METRICS).write_text("\n".join(lines) + "\n")
    facts = write_report(tmp_path, tmp_path).facts
    assert facts["Steps"] == "11, stage second (2 of 2)"
    assert facts["Bits a byte, first"] == "3.0000 at step 0, 2.4000 at step 7 (80%)"
    assert facts["Bits a byte, second"] == "1.5000 at step 11"


def test_documents_that_are_read_too_often_are_named(data):
    run = config(data)
    tokens = json.loads((data / "dataset.json").read_text())["sources"]["words"]["train"]["tokens"]
    five_passes = dataclasses.replace(run.stages[0], steps=5 * tokens // (8 * 32))
    leg = Leg(dataclasses.replace(run, stages=(five_passes, run.stages[1])), stage=0)
    assert leg.often_repeated() == {"words": pytest.approx(5, rel=0.02)}
    assert Leg(run, stage=0).often_repeated() == {}
    less_than_a_row = dataclasses.replace(run.stages[1], tokens=10)
    assert Leg(dataclasses.replace(run, stages=(run.stages[0], less_than_a_row)), stage=1).often_repeated() == {}


def test_the_same_stages_do_nothing_and_fewer_are_refused(data, finished):
    said, before, run = io.StringIO(), rows(finished), config(data)
    train(run, finished, Console(stream=said))
    assert "already at step 11: raise the last stage's length" in said.getvalue()
    assert rows(finished) == before
    with pytest.raises(ConfigError, match="in stage 2 and this run has 1"):
        train(dataclasses.replace(run, stages=run.stages[:1]), finished, Console(speaks=False))
