"""Runs a launcher as several processes on this host: one for each GPU, or processes of CPU devices.

  python -m launch.local --processes=2 --cpu_devices=4 -- pretrain --config=configs/quickstart.py --workdir=runs/two \
      --config.mesh.fsdp=8
  python -m launch.local --processes=8 -- pretrain --config=configs/text_1b.py --workdir=runs/text_1b

The processes find each other by themselves; each line that they print has the process's number in front. When one
fails, the others are stopped and the status is its. With one process, all GPUs are its devices.
"""

import sys

from absl import flags

from launch import program
from mmx.config import ConfigError

_PROCESSES = flags.DEFINE_integer("processes", 1, "How many processes.", lower_bound=1)
_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Virtual CPU devices of each process; 0 uses the host's GPUs.", lower_bound=0
)
_GRACE = flags.DEFINE_float(
    "grace_seconds",
    20.0,
    "How long the others may take to leave after one has failed, before they are killed.",
    lower_bound=0,
)
_LAUNCHERS = ("prepare", "pretrain", "generate", "report", "bench")


def run(arguments: list[str]) -> int:
    """Runs the launcher; the status of the first process that failed."""
    from mmx.parallel.local import join_on_this_host, run_processes

    if not arguments or arguments[0] not in _LAUNCHERS:
        given = f"{arguments[0]!r} is no launcher" if arguments else "no launcher is given"
        raise ConfigError(
            f"{given}: write it behind two dashes, as in -- pretrain --config=FILE (there are {', '.join(_LAUNCHERS)})"
        )
    environments = join_on_this_host(_PROCESSES.value) if _PROCESSES.value > 1 else [{}]
    for index, environment in enumerate(environments):
        if _CPU_DEVICES.value:
            environment["JAX_PLATFORMS"] = "cpu"
            environment["XLA_FLAGS"] = program.with_cpu_devices(_CPU_DEVICES.value)
        elif _PROCESSES.value > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(index)
    return run_processes(
        [sys.executable, "-u", "-m", f"launch.{arguments[0]}", *arguments[1:]], environments, _GRACE.value
    )


if __name__ == "__main__":
    program.main(run, takes_arguments=True)
