"""Running the launchers as a user does: as processes of their own, on one CPU device."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
ENVIRONMENT = os.environ | {
    # One device; the suite's own flags ask for eight.
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", ""),
    "PYTHONPATH": str(REPOSITORY),
}


def start(program: str, *arguments: str, cwd: Path = REPOSITORY) -> subprocess.Popen:
    """Starts ``python -m launch.PROGRAM ARGUMENTS``."""
    return subprocess.Popen(
        [sys.executable, "-m", f"launch.{program}", *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(program: str, *arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    """Runs it to its end."""
    process = start(program, *arguments, cwd=cwd)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def mistake(program: str, *arguments: str, cwd: Path = REPOSITORY) -> str:
    """The one line that a wrong call prints; it must end with status 1 and print nothing else on stderr."""
    result = run(program, *arguments, cwd=cwd)
    assert result.returncode == 1, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")
