"""A run that hangs is ended, after the stacks of all its threads were written where they can be read."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HUNG = 75  # exit status: sysexits' "temporary failure", start again
STACKS = "stacks"
# The interpreter itself may be stuck, with Python's lock held: a thread of C then does the same, this much later.
_MARGIN = 1.25


class Watchdog:
    """Ends the process if ``alive`` is not called for too long; does nothing before the first call and at ``rest``."""

    def __init__(self, seconds: float, folder: Path, process: int, log: Callable[[str], None]):
        """``folder`` takes the stacks; ``process`` is this process's number in the run."""
        self._seconds, self._log = seconds, log
        self._path = folder / STACKS / f"process-{process}.txt"
        self._since: float | None = None
        self._doing = ""
        self._closed = threading.Event()

    def alive(self, doing: str) -> None:
        """Says that the run goes on, and with what."""
        self._doing, self._since = doing, time.monotonic()

    def rest(self) -> None:
        """Stops counting until ``alive`` is called again: what comes now may take as long as it likes."""
        self._since = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watches while open. With 0 seconds there is nothing to do."""
        if not self._seconds:
            yield self
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            thread = threading.Thread(target=self._watch, args=(file,), name="watchdog", daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self._closed.set()
                thread.join()
                faulthandler.cancel_dump_traceback_later()
        if not self._path.stat().st_size:
            self._path.unlink()
            with contextlib.suppress(OSError):  # Another process's stacks may be there.
                self._path.parent.rmdir()

    def _watch(self, file) -> None:
        while not self._closed.wait(min(self._seconds / 4, 5.0)):
            # Armed anew at each look: it goes off when this thread cannot look any more.
            faulthandler.dump_traceback_later(self._seconds * _MARGIN, exit=True, file=file)
            since = self._since
            if since is None or time.monotonic() - since < self._seconds:
                continue
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: hung {self._doing} for {self._seconds:g} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            self._log(
                f"hung {self._doing} for more than {self._seconds:g} s; the stacks of all threads are in {self._path}; "
                "start again and the run goes on from its last checkpoint"
            )
            os._exit(HUNG)


def write_to_stderr(message: str) -> None:
    """A line that appears whichever process writes it."""
    print(message, file=sys.stderr, flush=True)
