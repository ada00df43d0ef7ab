"""Timing of asynchronous device work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

# Enough that starting a call costs nothing beside it, and few enough for slow ones.
_BATCH_SECONDS, _REPEATS, _MOST_CALLS = 0.05, 5, 100


def seconds_a_call(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Median over repeats of the time of one call when several are in flight.

    Args:
      call: starts the work.
      wait: blocks until what a call returned is there; waiting for the last means all are done.
    """
    wait(call())
    started = time.perf_counter()
    wait(call())
    once = time.perf_counter() - started
    calls = max(1, min(_MOST_CALLS, int(_BATCH_SECONDS / once)))
    times = []
    for _ in range(_REPEATS if once < 2 else 1):
        started = time.perf_counter()
        for _ in range(calls):
            last = call()
        wait(last)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)
