"""The sections of a GPU report, run one after the other, each in a fresh process so that the memory is all its own."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Section -> the function that its process calls with a Sink, as "module:function".
SECTIONS = {
    "rates": "mmx.bench.gpu.rates:measure",
    "correctness": "mmx.bench.gpu.correctness:compare_with_cpu",
    "cudnn": "mmx.bench.gpu.correctness:compare_cudnn",
    "quickstart": "mmx.bench.gpu.quickstart:compare_with_cpu",
    "attention": "mmx.bench.gpu.attention:measure",
    "attention_fla": "mmx.bench.gpu.peers:measure_fla",
    "attention_jla": "mmx.bench.gpu.peers:measure_jla",
    "experts": "mmx.bench.gpu.experts:measure",
    "train_8k": "mmx.bench.gpu.training:one_row_of_8k",
    "train_8x8k": "mmx.bench.gpu.training:eight_rows_of_8k",
    "train_64k": "mmx.bench.gpu.training:one_row_of_64k",
}


def report(names: Sequence[str], seconds: float, say: Callable[[str], None], output: Path | None) -> dict[str, Any]:
    """Runs sections; one that fails is reported as such and does not stop the others.

    Args:
      names: keys of ``SECTIONS``.
      seconds: most that one section may take.
      say: receives lines of text.
      output: JSON file that holds what is known after each section.

    Returns:
      Section name to its list of results, or to ``[{"failed": reason}]``.
    """
    results: dict[str, Any] = {}
    for name in names:
        say(f"== {name}")
        started = time.monotonic()
        results[name] = _run(name, seconds, say)
        say(f"   ({time.monotonic() - started:.0f} s)")
        if output is not None:
            output.write_text(json.dumps(results, indent=2) + "\n")
    return results


def _run(name: str, seconds: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(SECTIONS[name], theirs), daemon=True)
    process.start()
    theirs.close()
    results, deadline = [], time.monotonic() + seconds
    try:
        while ours.poll(max(deadline - time.monotonic(), 0)):
            kind, value = ours.recv()
            if kind == "done":
                break
            if kind == "result":
                results.append(value)
            else:
                say(f"   {value}")
        else:
            results.append({"failed": f"not done after {seconds:.0f} s"})
            say(f"   not done after {seconds:.0f} s")
    except EOFError:
        results.append({"failed": "the process ended; its message is above"})
        say("   the process ended; its message is above")
    finally:
        process.kill()
        process.join()
        ours.close()
    return results


def _serve(target: str, pipe: Connection) -> None:
    module, function = target.split(":")
    sink = Sink(pipe)
    getattr(import_module(module), function)(sink)
    pipe.send(("done", None))


class Sink:
    """Where a section puts what it finds."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe

    def say(self, line: str) -> None:
        """A line of text for whoever watches."""
        self._pipe.send(("line", line))

    def result(self, line: str, **values: Any) -> None:
        """A result for the JSON file, and its line of text."""
        self._pipe.send(("result", values))
        self.say(line)
