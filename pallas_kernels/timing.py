"""Timing a call on the device that is here."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

_CALLS = 10


def median_seconds(call: Callable[[], Any], repetitions: int = 10) -> float:
    """Seconds of a call: the median of several runs of ten calls each, after one that is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        jax.block_until_ready([call() for _ in range(_CALLS)][-1])
        times.append((time.perf_counter() - started) / _CALLS)
    return statistics.median(times)
