"""Runs launch.convert's work in a process of its own and reports the most memory that it had."""

import re
import subprocess
import sys
from pathlib import Path

from tests.launch.programs import ENVIRONMENT, REPOSITORY


def peak_bytes(*flags: str) -> int:
    """The process's largest resident size over a conversion with these flags."""
    command = [sys.executable, "-m", "tests.mmx.convert.peak", *flags]
    result = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, text=True, capture_output=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return int(re.search(r"peak (\d+)", result.stdout).group(1))


def main() -> None:
    # By the module, not the program: absl would end the process before the figure is read.
    from absl import flags

    from launch import convert

    flags.FLAGS(sys.argv)
    convert.run()
    # Not getrusage: its figure is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    print("peak", int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024)


if __name__ == "__main__":
    main()
