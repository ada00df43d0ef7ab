"""A run that is killed and told to stop, and goes on: the same metrics, step by step, as one that was left alone."""

import random
import signal
import time

import pytest

from mmx.train.goodput import WAYS
from mmx.train.metrics import read_metrics
from tests.launch.programs import run, start
from tests.words import prepare_words

STEPS = 24
CONFIG = """
from mmx.config import CheckpointConfig, DataConfig, OptimizerConfig, Phase, Run, TrainConfig
from tests.tiny import tiny
from tests.words import VOCAB_SIZE


def get_config():
    return Run(
        model=tiny(vocab_size=VOCAB_SIZE),
        data=DataConfig(path={data!r}, sequence_length=32, batch_size=4, heldout_sequences=4),
        optimizer=OptimizerConfig(peak_lr=1e-2, schedule=(Phase("linear", 1.0, steps=5), Phase("constant", 1.0))),
        train=TrainConfig(steps={steps}, log_every=1, eval_every=6),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )
"""
# What depends on the clock.
TIMES = ("tokens_per_second", "data_wait", "goodput", "starts", "time", *(f"seconds_{way}" for way in WAYS))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    path = folder / "config.py"
    path.write_text(CONFIG.format(data=str(prepare_words(folder / "words")), steps=STEPS))
    return path


def metrics(workdir):
    rows = [row for row in read_metrics(workdir) if "event" not in row]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    result = run("pretrain", f"--config={config}", f"--workdir={workdir}")
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in read_metrics(workdir) if "loss" in row] == list(range(1, STEPS + 1))
    return metrics(workdir)


def interrupt(config, workdir, signal_number, *, after_step: int, delay: float) -> tuple[int, str]:
    """Starts the run, sends it a signal some time after a step, returns its status and what it printed."""
    process = start("pretrain", f"--config={config}", f"--workdir={workdir}")
    deadline = time.monotonic() + 300
    while not any(row["step"] >= after_step and "loss" in row for row in read_metrics(workdir)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal_number)
    out, err = process.communicate(timeout=300)
    assert err == "", err
    return process.returncode, out


def test_killed_and_stopped_run_equals_one_left_alone(config, uninterrupted, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    message = f"seed of the interruptions: {seed}"
    workdir = tmp_path / "run"
    killed_after, stopped_after = chance.randint(1, 9), chance.randint(12, 18)
    status, _ = interrupt(config, workdir, signal.SIGKILL, after_step=killed_after, delay=chance.uniform(0, 0.2))
    assert status == -signal.SIGKILL, message
    status, out = interrupt(config, workdir, signal.SIGTERM, after_step=stopped_after, delay=chance.uniform(0, 0.05))
    assert status == 0, message
    assert "stopped by SIGTERM: saved step" in out, message
    saved = int(out.rsplit("saved step ", 1)[1].split()[0])
    assert (workdir / "checkpoints" / str(saved)).is_dir(), message

    last = run("pretrain", f"--config={config}", f"--workdir={workdir}")
    assert last.returncode == 0, last.stderr
    assert f"resuming from step {saved}" in last.stdout, message
    assert metrics(workdir) == uninterrupted, message
