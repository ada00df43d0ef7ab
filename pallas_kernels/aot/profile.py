"""The compiler's static cycle count of each kernel in a program.

libtpu walks the instruction bundles of a kernel through its grid, with a model of the memory, and writes the cycles to
a file. This takes seconds for some hundred grid steps. The model may abort the process, and it listens only to options
set before libtpu is loaded: each profile is a process of its own.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pallas_kernels.aot.chips import CHIPS, Chip
from pallas_kernels.aot.compile import COMPILER_ENVIRONMENT, compile_for_chip

_ROOT = Path(__file__).parents[2]


class ProfileError(RuntimeError):
    """A kernel that does not compile, or that the profiler cannot follow."""


def static_cycles(
    chip: Chip, case: str, arguments: dict[str, Any], timeout: float = 300, vmem_share: float = 1.0
) -> dict[str, int]:
    """Compiles a case and returns the cycles of each kernel in it, by the kernel's name.

    Args:
      case: "module:function"; called with ``arguments``, it returns a function and the shapes of its arguments.
      arguments: JSON values.
      timeout: seconds that compiler and profiler may take.
      vmem_share: of the VMEM that kernels get where they do not ask for more; below 1 for what has to fit with another
        compiler, or with small tables more, too.

    Raises:
      ProfileError: with the compiler's message.
    """
    with tempfile.TemporaryDirectory(prefix="static_profile_") as folder:
        options = f"--xla_jf_dump_to={folder} --xla_jf_dump_static_llo_profile_to={folder}/profile"
        if vmem_share < 1:
            options += f" --xla_tpu_scoped_vmem_limit_kib={int(vmem_share * chip.vmem / 1024)}"
        environment = os.environ | COMPILER_ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": options}
        # A program out of the cache is not compiled, and so not profiled.
        environment |= {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-m", "pallas_kernels.aot.profile", chip.name, case, json.dumps(arguments)]
        try:
            result = subprocess.run(
                command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise ProfileError(f"{case} on {chip.name}: not done after {timeout:.0f} s") from None
        cycles = _read(Path(folder, "profile"))
    if result.returncode or not cycles:
        raise ProfileError(f"{case} on {chip.name}: {_reason(result.stderr)}")
    return cycles


def _read(folder: Path) -> dict[str, int]:
    """Cycles by kernel; calls of one kernel add up."""
    cycles: dict[str, int] = {}
    for path in sorted(folder.glob("*.textproto")):
        for estimate in re.findall(r"hlo_op_estimate \{([^}]*)\}", path.read_text()):
            name = re.search(r'hlo_op_name: "([^"]*)"', estimate)
            count = re.search(r"estimated_cycles: (\d+)", estimate)
            if name and count:
                kernel = re.sub(r"\.\d+$", "", name[1])
                cycles[kernel] = cycles.get(kernel, 0) + int(count[1])
    return cycles


def _reason(stderr: str) -> str:
    telling = [line for line in stderr.splitlines() if re.search(r"Check failed|profiling of|Error|exceeds", line)]
    return (telling or stderr.splitlines()[-1:] or ["no message"])[0].strip()[:400]


def _main(chip: str, case: str, arguments: str) -> None:
    module, function = case.split(":")
    traced, shapes = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    compile_for_chip(CHIPS[chip], traced, *shapes)


if __name__ == "__main__":
    _main(*sys.argv[1:])
