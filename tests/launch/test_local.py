"""Several processes on this host: the same losses as one, and a failure of one ends all."""

import io
import json
import signal
import sys
import threading
import time

import numpy as np
import pytest

from mmx.parallel.local import run_processes
from mmx.train.metrics import read_metrics
from tests.launch.programs import mistake, run
from tests.words import prepare_words

CONFIG = """
from mmx.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, Phase, Run, TrainConfig
from tests.tiny import tiny
from tests.words import VOCAB_SIZE


def get_config():
    return Run(
        model=tiny(vocab_size=VOCAB_SIZE, remat="full"),
        mesh=MeshConfig(**{mesh!r}),
        data=DataConfig(path={data!r}, sequence_length=32, batch_size=8, heldout_sequences=8),
        optimizer=OptimizerConfig(peak_lr=1e-3, schedule=(Phase("linear", 1.0, steps=5), Phase("constant", 1.0))),
        train=TrainConfig(steps=5, log_every=1),
        checkpoint=CheckpointConfig(every=5),
    )
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        # Rows split over the processes, and all rows in both, each with half of the tokens.
        {"fsdp": 2, "expert": 2, "context": 2},
        {"context": 4, "tensor": 2},
    ],
    ids=str,
)
def test_two_processes_train_as_one(mesh, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(mesh=mesh, data=str(prepare_words(tmp_path / "words"))))
    losses = {}
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        arguments = ("pretrain", f"--config={config}", f"--workdir={workdir}")
        result = run("local", f"--processes={processes}", f"--cpu_devices={8 // processes}", "--", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "[0] " in result.stdout
        rows = read_metrics(workdir)
        losses[processes] = [row.get("loss", row.get("heldout_loss")) for row in rows if "event" not in row]
    assert len(losses[1]) == 7  # Five steps, and held-out documents before and after.
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-5)


def processes(*programs: str, grace: float = 5.0) -> tuple[int, str]:
    """Runs one Python program a process; the status and what was shown."""
    shown = io.StringIO()
    command = [sys.executable, "-u", "-c", "import json, os; exec(json.loads(os.environ['PROGRAM']))"]
    status = run_processes(command, [{"PROGRAM": json.dumps(program)} for program in programs], grace, shown)
    return status, shown.getvalue()


def test_lines_carry_the_number_of_their_process():
    status, shown = processes("print('one'); print('two')", "import sys; print('three', file=sys.stderr)")
    assert status == 0
    assert set(shown.splitlines()) == {"[0] one", "[0] two", "[1] three"}


def test_a_failure_ends_all_and_says_which():
    started = time.monotonic()
    status, shown = processes("import time; time.sleep(60)", "import sys; print('no luck'); sys.exit(3)")
    assert status == 3
    assert "[1] no luck" in shown
    assert "process 1 ended with status 3 (no luck): stopping the others" in shown
    assert time.monotonic() - started < 20


def test_one_that_does_not_stop_is_killed():
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    dies = "import os, signal, time; print('fine'); time.sleep(2); os.kill(os.getpid(), signal.SIGKILL)"
    status, shown = processes(deaf, dies, grace=1.0)
    assert status == 128 + signal.SIGKILL
    assert "process 1 ended with signal SIGKILL: stopping the others" in shown
    assert "1 still running after 1 s: killing them" in shown


def test_termination_is_handed_on():
    leaves = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(0)))\n"
    threading.Timer(2.0, lambda: signal.raise_signal(signal.SIGTERM)).start()
    status, shown = processes(*[leaves + "time.sleep(60)"] * 2)
    assert status == 0
    assert sorted(shown.splitlines()) == ["[0] saved", "[1] saved"]


def test_mistakes():
    assert mistake("local", "--processes=2").startswith("no launcher is given: write it behind two dashes")
    assert mistake("local", "--", "pretrian").startswith("'pretrian' is no launcher")
