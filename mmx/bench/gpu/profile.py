"""Which operations the device's time goes to, from a profiler trace."""

from __future__ import annotations

import collections
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink


def slowest_operations(work: Callable[[], None], most: int = 10) -> tuple[list[tuple[str, float, int]], float]:
    """Runs ``work`` under the profiler.

    Returns:
      The operations that took most device time, as (name, seconds, calls), and the device's seconds in all. Numbers at
      the ends of names are dropped, so that the copies of an operation in different loops count as one.
    """
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        work()
        jax.profiler.stop_trace()
        [trace] = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    devices = {e["pid"] for e in events if e.get("name") == "process_name" and "GPU" in e["args"]["name"]}
    streams = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and e["pid"] in devices and e["args"]["name"].startswith("Stream")
    }
    seconds, calls = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            name = _kind(event)
            seconds[name] += event["dur"] / 1e6
            calls[name] += 1
    return [(name, spent, calls[name]) for name, spent in seconds.most_common(most)], sum(seconds.values())


def report_operations(sink: Sink, slowest: list[tuple[str, float, int]], total: float) -> None:
    """Reports what ``slowest_operations`` found, an operation a line."""
    for name, spent, calls in slowest:
        sink.result(
            f"  {spent / total:5.1%} {spent * 1e3:9,.1f} ms {calls:6} calls  {name}",
            operation=name,
            share=spent / total,
            seconds_in_all=spent,
            calls=calls,
        )


def _kind(event: dict) -> str:
    kernel = event["name"].rstrip("0123456789_.")
    source = event.get("args", {}).get("name", "")  # The traced call that the kernel comes from.
    return f"{kernel[:60]}  {'/'.join(source.split('/')[-3:])}" if source else kernel[:100]
