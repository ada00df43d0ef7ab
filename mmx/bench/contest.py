"""Contestants in processes of their own, taking turns, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from mmx.bench.workload import DECODE, DECODE_TOKENS, WORKS, Contestant

OURS, TRANSFORMERS = "mmx", "transformers"
# Length of the prompt in front of the decoded tokens.
DECODE_PROMPT = 1024
# Timed pieces of work in a turn.
_PIECES = 2


def contest(lengths: Sequence[int], turns: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every work at every length with all contestants that are installed.

    Args:
      lengths: tokens of a training step and of a prefill.
      turns: of each contestant at each work and length; a turn is two timed pieces of work after one that is not
        counted, and the median over all turns counts.
      threads: CPU cores that each contestant may use.
      say: receives a line for every result.

    Returns:
      ``{"contestants": {name: description}, "tokens_per_second": {work: {length: {name: rate}}}}``.
    """
    names = [OURS]
    if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        names.append(TRANSFORMERS)
    else:
        say("PyTorch and Transformers are not installed: mmx is measured alone")
    with contextlib.ExitStack() as stack:
        pipes = {name: stack.enter_context(_process(name, threads)) for name in names}
        described = {name: _ask(pipe, "describe") for name, pipe in pipes.items()}
        say(" against ".join(described.values()) + f", {threads} threads each")
        rates: dict[str, dict[int, dict[str, float]]] = {}
        for work in WORKS:
            for length in [DECODE_PROMPT] if work == DECODE else lengths:
                seconds: dict[str, list[float]] = {name: [] for name in names}
                for _ in range(turns):
                    for name, pipe in pipes.items():
                        _ask(pipe, "run", work, length)  # Not counted: its memory comes back, the first one compiles.
                        seconds[name] += [_ask(pipe, "run", work, length) for _ in range(_PIECES)]
                tokens = DECODE_TOKENS if work == DECODE else length
                rate = {name: tokens / statistics.median(seconds[name]) for name in names}
                rates.setdefault(work, {})[length] = rate
                say(_line(work, length, rate))
    return {"contestants": described, "tokens_per_second": rates}


def growth(rates: dict[int, dict[str, float]], name: str) -> float:
    """Throughput at the longest length over that at the shortest: 1 if the time per token does not grow."""
    return rates[max(rates)][name] / rates[min(rates)][name]


def _line(work: str, length: int, rate: dict[str, float]) -> str:
    text = f"{work:8} {length:>6} tokens  " + "  ".join(
        f"{name} {value:8,.0f} tokens/s" for name, value in rate.items()
    )
    return text + (f"  ratio {rate[OURS] / rate[TRANSFORMERS]:.2f}" if TRANSFORMERS in rate else "")


@contextlib.contextmanager
def _process(name: str, threads: int) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(name, threads, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _serve(name: str, threads: int, pipe: Connection) -> None:
    """In the contestant's process: answers requests until the other end closes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    contestant = _make(name, threads)
    with contextlib.suppress(EOFError):
        while True:
            method, *arguments = pipe.recv()
            pipe.send(getattr(contestant, method)(*arguments))


def _make(name: str, threads: int) -> Contestant:
    # Imported here: each in its own process, after its cores are set.
    if name == OURS:
        from mmx.bench.ours import Ours

        return Ours()
    from mmx.bench.transformers import Transformers

    return Transformers(threads)


def _ask(pipe: Connection, method: str, *arguments: Any) -> Any:
    pipe.send((method, *arguments))
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError(f"a contestant ended while it did {method} {arguments}; its message is above") from None
