"""Steps that do not count: judged, counted, and after too many in a row the run goes back and skips their data."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.config import CheckpointConfig, ConfigError, DataConfig, MeshConfig, OptimizerConfig, Phase, Run, TrainConfig
from mmx.train.checksums import CHECKSUMS
from mmx.train.console import Console
from mmx.train.health import fresh_health, judge
from mmx.train.loop import train
from mmx.train.metrics import read_metrics
from mmx.train.placement import BatchPlacement
from tests.tiny import tiny
from tests.words import VOCAB_SIZE, prepare_words

BATCH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_words(tmp_path_factory.mktemp("words"))


def config(data, steps: int, **train_fields) -> Run:
    return Run(
        model=tiny(vocab_size=VOCAB_SIZE, num_layers=2, layer_pattern=("lightning", "softmax")),
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(path=str(data), sequence_length=32, batch_size=BATCH, heldout_sequences=0),
        optimizer=OptimizerConfig(peak_lr=1e-2, schedule=(Phase("constant", 1.0),)),
        train=TrainConfig(steps=steps, log_every=1, **train_fields),
        checkpoint=CheckpointConfig(every=5, keep=3),
    )


@pytest.fixture
def poison(monkeypatch):
    """A set of numbers of batches, counted from 1 as they are read, whose loss is not finite."""
    poisoned, count = set(), [-1]  # The first batch of zeros is for compiling.
    to_devices = BatchPlacement.to_devices

    def poisoning(self, row):
        count[0] += 1
        bad = count[0] in poisoned
        return to_devices(self, row | {"weights": np.full_like(row["weights"], np.nan)} if bad else row)

    monkeypatch.setattr(BatchPlacement, "to_devices", poisoning)
    return poisoned


def losses(workdir) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}


def test_goes_back_and_skips_the_data(data, tmp_path, poison):
    poison |= {8, 9, 10}
    said = io.StringIO()
    train(config(data, 14, rollback_after=3), tmp_path / "run", Console(stream=said))
    # The third bad step is known when the next one has been started.
    assert "going back from step 11 to 5; the data in between is skipped" in said.getvalue()
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 15))
    assert np.isfinite([row["loss"] for row in rows]).all()
    assert [row["rollbacks"] for row in rows] == 5 * [0] + 9 * [1]
    assert rows[-1]["skipped_steps"] == 3
    assert rows[-1]["seconds_lost"] > 0
    (event,) = (row for row in read_metrics(tmp_path / "run") if row.get("event") == "went back")
    assert (event["step"], event["from_step"]) == (5, 11)

    # The same by hand: from the checkpoint of step 5, with the position in the data moved behind batch 11.
    poison.clear()
    train(config(data, 5), tmp_path / "hand", Console(speaks=False))
    checkpoint = tmp_path / "hand" / "checkpoints" / "5"
    (checkpoint / CHECKSUMS).unlink()
    progress = json.loads((checkpoint / "progress" / "metadata").read_text())
    (position,) = (name for name, value in progress["data"].items() if value == 5 * BATCH)
    progress["data"][position] = 11 * BATCH
    (checkpoint / "progress" / "metadata").write_text(json.dumps(progress))
    train(config(data, 14), tmp_path / "hand", Console(speaks=False))
    assert losses(tmp_path / "run") == losses(tmp_path / "hand")


@pytest.mark.parametrize("first_checkpoint", [False, True])
def test_gives_up_when_going_back_does_not_help(data, tmp_path, poison, first_checkpoint):
    poison |= set(range(7 if first_checkpoint else 2, 100))
    with pytest.raises(ConfigError) as refusal:
        train(config(data, 50, rollback_after=3), tmp_path / "run", Console(speaks=False))
    expected = (
        "again after going back to step 5 3 times" if first_checkpoint else "there is no checkpoint to go back to"
    )
    assert expected in str(refusal.value)


def test_without_a_limit_bad_steps_are_only_counted(data, tmp_path, poison):
    poison |= {2, 3, 4}
    train(config(data, 5), tmp_path / "run", Console(speaks=False))
    assert [row["skipped_steps"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [0, 1, 2, 3, 3]


def judged(losses: list[float], factor: float) -> tuple[list[bool], list[int]]:
    health, good, in_a_row = fresh_health(), [], []
    judging = jax.jit(judge, static_argnums=3)
    for loss in losses:
        counts, health = judging(health, jnp.float32(loss), jnp.float32(1), factor)
        good.append(bool(counts))
        in_a_row.append(int(health.bad_in_a_row))
    return good, in_a_row


def test_spikes_are_judged_by_the_running_average():
    falling = [5.0, 4.8, 4.6, 4.5, 4.4]
    assert judged([*falling, 7.6, np.nan, 6.0, 9.0], 1.5) == (
        5 * [True] + [False, False, True, False],
        [0, 0, 0, 0, 0, 1, 2, 0, 1],
    )
    # Without a factor only what is not finite is bad; a spike does not raise the average that judges the next one.
    assert judged([*falling, 100.0, np.inf, 4.4], 0.0)[0] == 6 * [True] + [False, True]
    assert judged([4.0] + 200 * [7.0], 1.5)[0] == [True] + 200 * [False]


def test_a_gradient_that_is_not_finite_does_not_count():
    good, health = judge(fresh_health(), jnp.float32(4), jnp.float32(np.inf), 0.0)
    assert not good
    assert health.average_loss == 0


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("spike_factor", 0.9, "train.spike_factor=0.9 would skip ordinary steps"),
        ("rollback_after", -1, "train.rollback_after=-1 is too small"),
        ("hang_seconds", -1.0, "train.hang_seconds=-1.0 is too small"),
    ],
)
def test_mistakes(field, value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        dataclasses.replace(Run(), train=TrainConfig(**{field: value})).validate()
