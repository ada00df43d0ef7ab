"""Time and memory of asynchronous device work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

# Enough that starting a call costs nothing beside it, and few enough for slow ones.
_BATCH_SECONDS, _REPEATS, _MOST_CALLS = 0.05, 5, 100
# A call this long is timed once: it varies by less than the chip's clock does.
_LONG_SECONDS = 2.0


def compile_if_it_fits(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    """Compiles ``function`` under ``jax.jit(..., **options)`` for arguments, or their shapes.

    Returns:
      The compiled function, and the seconds that compiling it took.

    Raises:
      MemoryError: if arguments, results and temporaries are more than the device's memory; trying would take long.
    """
    started = time.perf_counter()
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    needed = bytes_needed(compiled)
    available = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", needed)
    if needed > available:
        raise MemoryError(f"out of memory, {needed / 2**30:.1f} GiB of {available / 2**30:.1f}")
    return compiled, seconds


def bytes_needed(compiled: Any) -> int:
    """Device memory of a compiled function's arguments, results and temporaries."""
    use = compiled.memory_analysis()
    return use.argument_size_in_bytes + use.output_size_in_bytes + use.temp_size_in_bytes - use.alias_size_in_bytes


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
