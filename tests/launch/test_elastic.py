"""One run on eight devices, then four, then two processes: the loss curve of a run that never moved, no row twice."""

import json

import numpy as np
import pytest

from mmx.train.metrics import read_metrics
from tests.launch.programs import run
from tests.words import prepare_words

CONFIG = """
from mmx.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, Phase, Run, TrainConfig
from tests.tiny import tiny
from tests.words import VOCAB_SIZE


def get_config():
    return Run(
        model=tiny(vocab_size=VOCAB_SIZE, num_layers=2, layer_pattern=("lightning", "softmax")),
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(path={data!r}, sequence_length=32, batch_size=8, heldout_sequences=0),
        optimizer=OptimizerConfig(peak_lr=1e-3, schedule=(Phase("linear", 1.0, steps=5), Phase("constant", 1.0))),
        train=TrainConfig(log_every=1),
        checkpoint=CheckpointConfig(every=5, keep=1),
    )
"""
# Flags of launch.local and of the run, up to the step that is reached with them.
MOVES = {
    6: (("--cpu_devices=8",), ("--config.mesh.expert=2",)),
    12: (("--cpu_devices=4",), ("--config.mesh.context=2", "--config.mesh.tensor=2", "--config.train.micro_batches=4")),
    18: (("--processes=2", "--cpu_devices=1"), ("--config.train.micro_batches=2",)),
}


@pytest.mark.slow
def test_a_run_moves_between_meshes_and_processes(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(data=str(prepare_words(tmp_path / "words"))))

    def train(name: str, steps: int, host, flags) -> None:
        arguments = (f"--config={config}", f"--workdir={tmp_path / name}", f"--config.train.steps={steps}", *flags)
        result = run("local", *host, "--", "pretrain", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr

    for steps, (host, flags) in MOVES.items():
        train("moved", steps, host, flags)
    train("stayed", 18, ("--cpu_devices=1",), ())
    losses = {}
    for name in ("moved", "stayed"):
        rows = [row for row in read_metrics(tmp_path / name) if "loss" in row]
        assert [row["step"] for row in rows] == list(range(1, 19))
        losses[name] = [row["loss"] for row in rows]
        progress = json.loads((tmp_path / name / "checkpoints" / "18" / "progress" / "metadata").read_text())
        # Every row up to here, and none beyond: the position is the number of rows that were read.
        assert 18 * 8 in progress["data"].values()
    np.testing.assert_allclose(losses["moved"], losses["stayed"], rtol=2e-5)
