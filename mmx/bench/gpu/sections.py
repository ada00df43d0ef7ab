"""The sections of a GPU report, one after the other, each in a fresh process so that the memory is all its own.

Sections that take no times run together. What a section needs from the host's CPU is computed beside the sections
before it, on cores that those leave alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


class Section(NamedTuple):
    """What a section's processes call with a ``Sink``, as "module:function"."""

    on_gpu: str
    on_cpu: str | None = None  # first, beside the sections before; its files in ``Sink.folder`` are the other's input
    shares_gpu: bool = False  # takes no times, so that neighbours which take none either may run beside it
    memory: float | None = None  # share of a GPU's that JAX takes at once; None leaves it to the environment


_PACKAGE = "mmx.bench.gpu"
# Those that compare with the CPU come late: the CPU's part is done by then. FLA, which tunes for minutes, comes last.
SECTIONS = {
    "rates": Section(f"{_PACKAGE}.rates:measure"),
    "attention": Section(f"{_PACKAGE}.attention:measure"),
    "attention_jla": Section(f"{_PACKAGE}.peers:measure_jla"),
    "experts": Section(f"{_PACKAGE}.experts:measure"),
    "train": Section(f"{_PACKAGE}.training:measure"),
    "cudnn": Section(f"{_PACKAGE}.correctness:compare_cudnn", shares_gpu=True),
    "correctness": Section(f"{_PACKAGE}.correctness:compare", f"{_PACKAGE}.correctness:compute_on_cpu", True),
    "quickstart": Section(f"{_PACKAGE}.quickstart:compare", f"{_PACKAGE}.quickstart:train_on_cpu", True),
    # NCCL keeps its buffers outside JAX's share.
    "meshes": Section(f"{_PACKAGE}.meshes:measure", memory=0.88),
    "attention_fla": Section(f"{_PACKAGE}.peers:measure_fla"),
}
# Cores that are left to the sections on the GPU, where there are as many again.
_GPU_CORES = 4


def report(names: Sequence[str], seconds: float, say: Callable[[str], None], output: Path | None) -> dict[str, Any]:
    """Runs sections; one that fails is reported as such and does not stop the others.

    Args:
      names: keys of ``SECTIONS``.
      seconds: most that one section may take, and that is waited for its part on the CPU.
      say: receives lines of text.
      output: JSON file that holds what is known after each section.

    Returns:
      Section name to its list of results; that of a failure is ``{"failed": reason}``.
    """
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        folders = {name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for name in names}
        compared = [name for name in names if SECTIONS[name].on_cpu]
        on_cpu = {
            name: stack.enter_context(_process(SECTIONS[name].on_cpu, folders[name], cores=cores))
            for name, cores in zip(compared, _share_cores(len(compared)), strict=True)
        }
        for stage in _stages(names):
            say(f"== {', '.join(stage)}")
            for name in stage:
                results[name] = _collect(on_cpu[name], seconds, say) if name in on_cpu else []
            with contextlib.ExitStack() as running:
                pipes = {
                    name: running.enter_context(
                        _process(
                            SECTIONS[name].on_gpu, folders[name], share=len(stage) > 1, memory=SECTIONS[name].memory
                        )
                    )
                    for name in stage
                    if not any("failed" in result for result in results[name])
                }
                for name, pipe in pipes.items():
                    results[name] += _collect(pipe, seconds, say)
            if output is not None:
                output.write_text(json.dumps(results, indent=2) + "\n")
    return results


def _stages(names: Sequence[str]) -> list[list[str]]:
    """Sections that run together."""
    groups = itertools.groupby(names, lambda name: None if SECTIONS[name].shares_gpu else name)
    return [list(group) for _, group in groups]


def _share_cores(shares: int) -> list[list[int]]:
    """Disjoint cores for each share, where there are enough for all."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < _GPU_CORES + shares or len(cores) < 2 * _GPU_CORES:
        return [cores] * shares
    return [cores[_GPU_CORES + share :: shares] for share in range(shares)]


@contextlib.contextmanager
def _process(
    target: str, folder: Path, *, cores: Sequence[int] = (), share: bool = False, memory: float | None = None
) -> Iterator[Connection]:
    """Runs ``target`` in a process, which is ended when the context is left.

    Args:
      cores: without the GPU on these; empty for all of the machine.
      share: leave GPU memory to others.
      memory: as in ``Section``.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(target, folder, cores, share, memory, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _collect(pipe: Connection, seconds: float, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Results of a process until it is done."""
    results: list[dict[str, Any]] = []

    def fail(reason: str) -> list[dict[str, Any]]:
        say(f"   {reason}")
        return [*results, {"failed": reason}]

    deadline = time.monotonic() + seconds
    try:
        while pipe.poll(max(deadline - time.monotonic(), 0)):
            kind, value = pipe.recv()
            if kind == "done":
                return results
            if kind == "result":
                results.append(value)
            else:
                say(f"   {value}")
        return fail(f"not done after {seconds:.0f} s")
    except EOFError:
        return fail("the process ended; its message is above")


def _serve(
    target: str, folder: Path, cores: Sequence[int], share: bool, memory: float | None, pipe: Connection
) -> None:
    if cores:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.sched_setaffinity(0, cores)
    if share:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if memory is not None:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(memory)
    module, function = target.split(":")
    sink, started = Sink(pipe, folder), time.monotonic()
    getattr(import_module(module), function)(sink)
    sink.say(f"({target.removeprefix(_PACKAGE + '.')} took {time.monotonic() - started:.0f} s)")
    pipe.send(("done", None))


class Sink:
    """Where a section puts what it finds.

    Attributes:
      folder: for files of the section, the same for its part on the CPU.
    """

    def __init__(self, pipe: Connection, folder: Path):
        self._pipe = pipe
        self.folder = folder

    def say(self, line: str) -> None:
        """A line of text for whoever watches."""
        self._pipe.send(("line", line))

    def result(self, line: str, **values: Any) -> None:
        """A result for the JSON file, and its line of text."""
        self._pipe.send(("result", values))
        self.say(line)
