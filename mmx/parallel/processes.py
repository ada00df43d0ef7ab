"""Joining the processes of a run into one set of devices."""

import os

import jax

# Set by launch.local, or by hand, for every process of a run that no cluster manager started.
COORDINATOR, COUNT, INDEX = "MMX_COORDINATOR", "MMX_NUM_PROCESSES", "MMX_PROCESS_ID"


def join_processes(managed: bool) -> None:
    """Connects this process with the others of its run; call it before JAX is used.

    Args:
      managed: True lets JAX ask the cluster manager (TPU pods, Slurm, Open MPI, Kubernetes) who the others are. False
        takes the environment that ``launch.local`` sets; without it the process is on its own.
    """
    if managed:
        jax.distributed.initialize()
    elif COORDINATOR in os.environ:
        jax.distributed.initialize(
            os.environ[COORDINATOR], num_processes=int(os.environ[COUNT]), process_id=int(os.environ[INDEX])
        )
