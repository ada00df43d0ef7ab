"""A whole run in one process, on eight virtual devices: learns, reports, evaluates, goes on."""

import html
import io
import json
from pathlib import Path

import numpy as np
import pytest

from mmx.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Phase,
    Run,
    TrainConfig,
    load_json,
)
from mmx.pretrained import load
from mmx.train.console import Console
from mmx.train.loop import train
from mmx.train.metrics import read_metrics
from mmx.train.report import write_report
from tests.tiny import tiny
from tests.words import VOCAB_SIZE, prepare_words

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "loss_curve.json"
STEPS = 50


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepare_words(tmp_path_factory.mktemp("words"))


def config(data: Path, **changes) -> Run:
    values = {
        "model": tiny(vocab_size=VOCAB_SIZE),
        "mesh": MeshConfig(replica=2, fsdp=-1),
        "data": DataConfig(path=str(data), sequence_length=32, batch_size=8, heldout_sequences=8),
        "optimizer": OptimizerConfig(peak_lr=1e-2, schedule=(Phase("linear", 1.0, steps=5), Phase("constant", 1.0))),
        "train": TrainConfig(steps=STEPS, log_every=1, eval_every=25),
        "checkpoint": CheckpointConfig(every=30, keep=2),
    }
    return Run(**values | changes)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run: its workdir, outcome and what it said."""
    workdir, said = tmp_path_factory.mktemp("run"), io.StringIO()
    outcome = train(config(data), workdir, Console(stream=said))
    return workdir, outcome, said.getvalue()


def test_golden_loss_curve(finished, write_golden):
    losses = [row["loss"] for row in read_metrics(finished[0]) if "loss" in row]
    if write_golden:
        GOLDEN.write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n")
    golden = json.loads(GOLDEN.read_text())
    # Rounding grows from step to step of a model that learns its data by heart: it is 1e-6 at first, a percent late.
    np.testing.assert_allclose(losses[:20], golden[:20], rtol=1e-3)
    np.testing.assert_allclose(losses, golden, rtol=0.03)


def test_learns(finished):
    workdir, outcome, _ = finished
    heldout = [row["heldout_loss"] for row in read_metrics(workdir) if "heldout_loss" in row]
    assert outcome.step == STEPS
    assert len(heldout) == 3
    assert heldout[-1] == outcome.heldout.nats_per_token < 0.6 * heldout[0]


def test_metrics_rows_have_what_is_promised(finished):
    row = next(row for row in read_metrics(finished[0]) if row["step"] == 10)
    assert row["tokens"] == 10 * 8 * 32
    assert row["learning_rate"] == pytest.approx(1e-2)
    names = "loss grad_norm tokens_per_second data_wait router_load router_load_max drop_rate skipped_steps"
    assert set(names.split()) <= set(row)
    load_LE = np.asarray(row["router_load"])
    assert load_LE.shape == (6, 4)
    np.testing.assert_allclose(load_LE.sum(-1), 1, atol=1e-3)
    assert any((finished[0] / "tensorboard").iterdir())


def test_workdir_can_be_loaded(finished, data):
    workdir, _, _ = finished
    assert load_json(workdir / "config.json").model.vocab_size == VOCAB_SIZE
    model = load(workdir)
    assert np.isfinite(model.logits(np.ones((1, 5), np.int32))).all()
    prompt = model.tokenizer.encode("def return state")
    text = model.tokenizer.decode(model.generate(prompt, max_new_tokens=8).tolist())
    assert text.startswith("def return state")
    assert "checkpoints/30" in str(next((workdir / "checkpoints").glob("30")))
    load(workdir / "checkpoints" / "30")


def test_report(finished, tmp_path):
    report = write_report(finished[0], tmp_path)
    assert report.pictures[0].read_bytes().startswith(b"\x89PNG")
    assert report.facts["Steps"] == "50 of 50"
    for value in report.facts.values():
        assert html.escape(value) in report.page.read_text()


def test_more_steps_go_on_and_the_same_steps_do_nothing(finished, data):
    workdir, _, _ = finished
    said = io.StringIO()
    assert train(config(data), workdir, Console(stream=said)).step == STEPS
    assert "already at step 50: raise train.steps" in said.getvalue()
    train(config(data, train=TrainConfig(steps=STEPS + 2, log_every=1)), workdir, Console(stream=said))
    assert "resuming from step 50" in said.getvalue()
    assert [row["step"] for row in read_metrics(workdir) if "loss" in row] == list(range(1, STEPS + 3))


def test_vocabulary_that_does_not_fit(data, tmp_path):
    with pytest.raises(ConfigError, match=f"vocab_size=61 does not fit.*at least {VOCAB_SIZE}"):
        train(config(data, model=tiny()), tmp_path / "run", Console(speaks=False))
    assert not (tmp_path / "run").exists()


def test_report_of_a_run_that_has_not_begun(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        write_report(tmp_path, tmp_path)
