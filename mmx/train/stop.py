"""Stopping a run cleanly: SIGTERM (a preempted machine) and Ctrl-C finish the step, save and leave.

All processes of a run stop at the same step, so that they can save together.
Whichever process is asked first pins that on the board. Every process has a thread that reads it there and answers at
once with the number of steps that its process has begun, whatever the process is waiting for; all stop before the first
step that none has begun. A step costs the main thread no communication.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from mmx.parallel.processes import PATIENCE, Board

# Seconds between looks at the board.
_EVERY = 0.5
_TOPIC = "stop"


class StopRequest:
    """Says whether the run is to stop now, and what asked for it."""

    def __init__(self, board: Board) -> None:
        # What stopped the run; set at the step that all processes agreed on.
        self.signal: signal.Signals | None = None
        self._board = board
        self._asked: signal.Signals | None = None
        self._lock = threading.Lock()
        self._begun = 0  # steps, counting those that a run going back takes again
        self._announced = False
        self._last: int | None = None  # step before which all stop
        self._agreed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)
        if board.count > 1:
            self._thread.start()

    def __bool__(self) -> bool:
        return self.signal is not None

    def ask(self, number: signal.Signals) -> None:
        """Asks for a stop, on behalf of all processes."""
        self._asked = number

    def reached(self) -> bool:
        """Whether to stop instead of beginning another step; every process calls it before every step.

        Raises:
          RuntimeError: if the run is to stop and another process does not answer.
        """
        if self._board.count == 1:
            self.signal = self._asked
            return bool(self)
        with self._lock:
            self._begun += 1
            announced = self._announced
        if not announced:
            return False
        if not self._agreed.wait(PATIENCE) or self._last is None:
            raise RuntimeError("the run was asked to stop and the processes could not agree on a step")
        if self._begun >= self._last:
            self.signal = self._asked
        return bool(self)

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()

    def _listen(self) -> None:
        while not self._closed.wait(_EVERY):
            if self._asked is not None:
                self._board.pin(_TOPIC, self._asked.name)
            name = self._board.read(_TOPIC)
            if name is None:
                continue
            with self._lock:
                self._announced, begun = True, self._begun
            try:
                self._last = 1 + max(map(int, self._board.gather(str(begun))))
            finally:
                self._asked = signal.Signals[name]
                self._agreed.set()
            return


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or Ctrl-C into a request; a second one acts as it normally does."""
    request = StopRequest(Board())
    previous = {}

    def ask(number: int, _) -> None:
        request.ask(signal.Signals(number))
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        request.close()
