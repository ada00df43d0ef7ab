"""launch.pod at its front door: wrong calls, and the transcript in README."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.programs import ENVIRONMENT, REPOSITORY, mistake, run

README = REPOSITORY / "README.md"
POD = ("--name=moe", "--zone=us-east5-a", "--accelerator_type=v5p-16", "--records=/nonexistent")


def transcript() -> str:
    """README's, as it stands there."""
    [block] = re.findall(r"```console\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return block


def play(block: str, folder: Path) -> str:
    """The same lines with what the commands print now."""
    (folder / "python").symlink_to(sys.executable)
    environment = ENVIRONMENT | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *(p for p in sys.path if p and Path(p).is_dir())])
    lines = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    script = "\n".join(f"printf '%s\\n' {shlex.quote('$ ' + line)}\n{line}" for line in lines)
    result = subprocess.run(
        ["bash", "-ec", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_transcript_in_readme_is_what_the_commands_print(tmp_path, write_golden):
    now = play(transcript(), tmp_path)
    if write_golden:
        README.write_text(README.read_text().replace(transcript(), now))
    assert transcript() == now
    made = [line for line in now.splitlines() if line.startswith("gcloud")]
    assert {"create", "describe", "scp", "ssh", "delete"} <= {line.split()[4] for line in made}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "no action is given; write one of create, setup, run"),
        (("crate", *POD), "'crate' is no action; did you mean 'create'?"),
        (("create",), "--name is missing"),
        (("create", "--name=moe", "--records=/nonexistent"), "--zone is missing: there is no record of moe"),
        (("create", *POD, "--zone=us-east5"), "write a zone such as us-east5-a"),
        (("create", *POD, "--accelerator_type=v5p-12"), "does not exist: v5p counts cores"),
        (("create", *POD, "--spot", "--reserved"), "--spot and --reserved exclude each other"),
        (("create", *POD, "v5p-16"), "create takes no argument 'v5p-16'"),
        (("run", *POD), "no launcher is given: write it behind two dashes"),
        (("run", *POD, "--", "train"), "'train' is no launcher"),
        (("run", *POD, "--", "pretrain", "--workdir=runs/x"), "an absolute path that every host sees"),
        (("resume", *POD), "knows of no run: start one with run"),
        (("ssh", *POD, "--slice=1"), "slice 1: moe has 1, counted from 0"),
        (("create", *POD, "--slcies=2"), "Unknown command line flag 'slcies'. Did you mean: slices ?"),
    ],
)
def test_mistakes(arguments, sentence):
    assert sentence in mistake("pod", *arguments)


def test_a_bucket_is_no_workdir_without_a_pod():
    sentence = mistake("pretrain", "--config=configs/quickstart.py", "--workdir=gs://mine/run")
    assert "--workdir=gs://mine/run: a workdir is a folder: mount the bucket and give the path" in sentence


def test_help():
    out = run("pod", "--help").stdout
    assert "python -m launch.pod resume --name=moe --watch" in out
    assert "--accelerator_type" in out
