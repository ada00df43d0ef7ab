"""A program as several processes of one host: starts them, shows what they print, and ends all when one fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from mmx.parallel.processes import COORDINATOR, COUNT, INDEX


def run_processes(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    grace: float,
    stream: TextIO | None = None,
) -> int:
    """Runs a command once with each environment and waits for all.

    Every line that a process prints appears with its number in front. SIGTERM and Ctrl-C are handed on. When a process
    fails, the others get SIGTERM, and SIGKILL if they are still there ``grace`` seconds later: they may be waiting in a
    collective operation for the one that is gone.

    Args:
      command: program and arguments.
      environments: variables of each process, on top of this one's.
      grace: seconds.
      stream: where lines go; standard output if None.

    Returns:
      0, or the status of the first process that failed (128 + the signal's number for one that a signal ended).
    """
    stream = stream or sys.stdout
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C reaches this process alone, which hands it on once.
            start_new_session=True,
        )
        for environment in environments
    ]
    last_lines = [""] * len(processes)
    threads = [
        threading.Thread(target=_show, args=(index, process, stream, last_lines), daemon=True)
        for index, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    with _handing_on(processes):
        failed = _wait(processes, grace, stream, last_lines)
    for thread in threads:
        thread.join(timeout=5)
    return failed


def join_on_this_host(count: int) -> list[dict[str, str]]:
    """Variables with which ``count`` processes find each other, over the loopback interface alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = {COORDINATOR: address, COUNT: str(count), "JAX_COORDINATOR_BIND_ADDRESS": address}
    return [shared | {INDEX: str(index)} for index in range(count)]


def _show(index: int, process: subprocess.Popen, stream: TextIO, last_lines: list[str]) -> None:
    for line in process.stdout:
        last_lines[index] = line.strip() or last_lines[index]
        stream.write(f"[{index}] {line}" if line.endswith("\n") else f"[{index}] {line}\n")
        stream.flush()


def _wait(processes: Sequence[subprocess.Popen], grace: float, stream: TextIO, last_lines: Sequence[str]) -> int:
    failed, deadline = 0, None
    while running := [process for process in processes if process.poll() is None]:
        # Of several, one that a signal ended comes first: others may have failed because it was gone.
        broken = min((p for p in processes if p.returncode), key=lambda p: p.returncode, default=None)
        if broken is not None and deadline is None:
            failed, deadline = _status(broken.returncode), time.monotonic() + grace
            index = processes.index(broken)
            # A signal's victim said nothing about it.
            reason = f" ({last_lines[index]})" if broken.returncode > 0 and last_lines[index] else ""
            stream.write(f"process {index} ended with {_words(broken.returncode)}{reason}: stopping the others\n")
            stream.flush()
            for process in running:
                process.terminate()
        if deadline is not None and time.monotonic() > deadline:
            stream.write(f"{len(running)} still running after {grace:.0f} s: killing them\n")
            stream.flush()
            for process in running:
                process.kill()
            deadline = time.monotonic() + grace
        time.sleep(0.05)
    return failed or next((_status(p.returncode) for p in processes if p.returncode), 0)


def _status(returncode: int) -> int:
    return returncode if returncode > 0 else 128 - returncode


def _words(returncode: int) -> str:
    return f"status {returncode}" if returncode > 0 else f"signal {signal.Signals(-returncode).name}"


class _handing_on:
    """While open, SIGTERM and SIGINT go to the processes instead of ending this one."""

    def __init__(self, processes: Sequence[subprocess.Popen]):
        self._processes, self._previous = processes, {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._hand_on)

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, _) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)
