"""Joining the processes of a run into one set of devices, and what they tell each other besides collectives."""

from __future__ import annotations

import itertools
import os
from typing import Any

import jax
from jax._src import distributed  # JAX names no public way to the client of its coordination service.

# Set by launch.local, or by hand, for every process of a run that no cluster manager started.
COORDINATOR, COUNT, INDEX = "MMX_COORDINATOR", "MMX_NUM_PROCESSES", "MMX_PROCESS_ID"

# Seconds without a sign of life after which a process counts as dead, and every other one ends itself.
HEARTBEAT = 60
# Seconds that processes wait for each other's goodbye.
FAREWELL = 60
# Seconds that processes wait for each other's answer; reading a large checkpoint lies between question and answer.
PATIENCE = 1800.0


def join_processes(managed: bool) -> None:
    """Connects this process with the others of its run; call it before JAX is used.

    Args:
      managed: True lets JAX ask the cluster manager (TPU pods, Slurm, Open MPI, Kubernetes) who the others are. False
        takes the environment that ``launch.local`` sets; without it the process is on its own.
    """
    timeouts = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": FAREWELL}
    if managed:
        jax.distributed.initialize(**timeouts)
    elif COORDINATOR in os.environ:
        jax.distributed.initialize(
            os.environ[COORDINATOR],
            num_processes=int(os.environ[COUNT]),
            process_id=int(os.environ[INDEX]),
            **timeouts,
        )


class Board:
    """A board of notes that all processes of a run read and write, kept by JAX's coordination service.

    It needs no device: processes can agree while their devices compute, or hang. Every process makes its boards, and
    gathers on them, in the same order.
    """

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self._prefix = f"mmx/{next(Board._numbers)}"
        self._gathered = itertools.count()

    @property
    def _client(self) -> Any:
        return distributed.global_state.client

    def pin(self, topic: str, note: str) -> None:
        """Writes a note for all; a later one replaces it."""
        self._client.key_value_set(f"{self._prefix}/pinned/{topic}", note, allow_overwrite=True)

    def read(self, topic: str) -> str | None:
        """The note of a topic, if there is one."""
        return dict(self._client.key_value_dir_get(f"{self._prefix}/pinned/")).get(f"{self._prefix}/pinned/{topic}")

    def gather(self, note: str, seconds: float = PATIENCE) -> list[str]:
        """Everybody's note, in the order of the processes; returns when all have written theirs.

        Raises:
          RuntimeError: if one has not within ``seconds``.
        """
        if self.count == 1:
            return [note]
        prefix = f"{self._prefix}/gathered/{next(self._gathered)}"
        self._client.key_value_set(f"{prefix}/{self.index}", note)
        notes = []
        for index in range(self.count):
            try:
                notes.append(self._client.blocking_key_value_get(f"{prefix}/{index}", int(1000 * seconds)))
            except jax.errors.JaxRuntimeError as error:
                raise RuntimeError(f"process {index} did not answer within {seconds:.0f} s ({error})") from None
        return notes
