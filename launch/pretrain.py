"""Pre-trains a model, going on from the newest checkpoint in the workdir if there is one.

  python -m launch.pretrain --config=configs/quickstart.py --workdir=runs/quickstart

Any field of the configuration can be overridden: --config.train.steps=1000 --config.optimizer.peak_lr=1e-3
SIGTERM and Ctrl-C save and leave; the same command then goes on. Several processes on this host: launch.local.
"""

import signal
from pathlib import Path

from absl import flags

from launch import program

_CONFIG = program.define_config()
flags.declare_key_flag("config")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and the resolved config.", required=True
)
# A path would make a local folder of that name out of it.
flags.register_validator(
    "workdir",
    lambda workdir: workdir is None or "://" not in workdir,
    "a workdir is a folder: mount the bucket and give the path (launch.pod does so on its hosts)",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes that a cluster manager started (a TPU pod, Slurm, ...)."
)


def run() -> int:
    """Trains as the flags say; 130 if stopped by Ctrl-C."""
    config = program.require_config(_CONFIG.value)
    import jax

    from mmx.parallel.processes import join_processes
    from mmx.train.console import Console
    from mmx.train.loop import train

    join_processes(managed=_DISTRIBUTED.value)
    with program.leaving_at_once():
        outcome = train(config, Path(_WORKDIR.value), Console(speaks=jax.process_index() == 0))
    return 130 if outcome.stopped_by == signal.SIGINT else 0


if __name__ == "__main__":
    program.main(run)
