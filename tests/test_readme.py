"""README's commands and Python, executed as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.programs import ENVIRONMENT, REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_two_set_up_commands_come_first():
    first = [line.split("#")[0].strip() for line in blocks("bash")[0].splitlines()]
    assert first == ["bash launch/quickstart.sh", "bash tests/run.sh"]


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target


def test_files_on_the_way_from_tokens_to_loss_exist():
    sentence = re.search(r"From tokens to loss: (.*?)\n\n", README, flags=re.DOTALL).group(1)
    paths = re.findall(r"`([^`]+)`", sentence)
    assert len(paths) <= 8
    for path in paths:
        assert (REPOSITORY / path).exists() or (REPOSITORY / "mmx" / "model" / path).exists(), path


@pytest.mark.slow
def test_commands_run_as_written(tmp_path):
    # In a folder of their own, with what they name by relative paths.
    for name in ("mmx", "pallas_kernels", "configs", "launch"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    environment = ENVIRONMENT | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    # The symlink must still find this environment's packages.
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p and Path(p).is_dir())])

    def run(command: list[str]) -> str:
        result = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=900)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        return result.stdout

    for command in [*blocks("bash")[1].splitlines(), *blocks("bash")[2].splitlines()]:
        assert command.startswith("python -m launch.")
        run(["bash", "-c", command])
    [code] = blocks("python")
    assert "import jax" in run(["python", "-c", code])
    assert (tmp_path / "runs" / "mine" / "report.png").exists()
