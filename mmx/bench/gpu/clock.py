"""Timing of asynchronous device work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

# Enough that starting a call costs nothing beside it, and few enough for slow ones.
_BATCH_SECONDS, _REPEATS, _MOST_CALLS = 0.05, 5, 100
# A call this long is timed once: it varies by less than the chip's clock does.
_LONG_SECONDS = 2.0


def seconds_a_call(call: Callable[[], Any], wait: Callable[[Any], Any], compiled: bool = False) -> float:
    """Median over repeats of the time of one call when several are in flight.

    Args:
      call: starts the work.
      wait: blocks until what a call returned is there; waiting for the last means all are done.
      compiled: the first call compiles nothing, so that it may count where the work is long.
    """
    first = _time(call, wait, 1)
    if compiled and first >= _LONG_SECONDS:
        return first
    once = _time(call, wait, 1)
    if once >= _LONG_SECONDS:
        return once
    calls = max(1, min(_MOST_CALLS, int(_BATCH_SECONDS / once)))
    return statistics.median(_time(call, wait, calls) for _ in range(_REPEATS))


def _time(call: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    started = time.perf_counter()
    last = None
    for _ in range(calls):
        last = None  # Before the next call: two results of a long one would not fit.
        last = call()
    wait(last)
    return (time.perf_counter() - started) / calls
