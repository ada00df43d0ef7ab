"""Stopping a run cleanly: SIGTERM (a preempted machine) and Ctrl-C finish the step, save and leave."""

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """Says whether the run was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or Ctrl-C into a request; a second one acts as it normally does."""
    request = StopRequest()
    previous = {}

    def ask(number: int, _) -> None:
        request.signal = signal.Signals(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
