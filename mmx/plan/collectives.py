"""The collective operations of a compiled TPU program, and how much of them runs beside computation."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from mmx.plan.hlo import Instruction, Program, arrays, parse, size

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_BRANCHES = ("to_apply", "true_computation", "false_computation", "branch_computations")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of the program."""

    kind: str  # one of ``KINDS``
    result: str  # type of what it leaves on a device, as XLA writes it
    size: int  # bytes of it
    times: int  # how often a step runs it
    is_async: bool  # split into a start and a done
    overlapped: int  # matrix products that are scheduled between the two
    source: str  # the operation in our code that it comes from, as JAX names it
    # Devices that talk to each other, by their place in the mesh: the first group, or of a permutation the first pair;
    # the others are alike. Empty: all devices.
    group: tuple[int, ...] = ()


def collectives(program: str | Program) -> list[Collective]:
    """The collectives that one run of a program executes.

    Args:
      program: compiled for TPU; ``jax.stages.Compiled.as_text()``, or that parsed. A loop whose turns the data decide
        counts once.
    """
    program = parse(program) if isinstance(program, str) else program
    return list(_walk(program, program.entry, 1))


def moved(found: list[Collective]) -> Mapping[str, tuple[int, int]]:
    """Kind to how often a step runs it and how many bytes it leaves on a device in all."""
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for collective in found:
        totals[collective.kind][0] += collective.times
        totals[collective.kind][1] += collective.times * collective.size
    return {kind: (times, size) for kind, (times, size) in totals.items()}


def collective_of(program: Program, instruction: Instruction) -> Collective | None:
    """The collective that an instruction starts or is, run once; None for another instruction, and for a done."""
    operation, carrier = instruction.operation, instruction
    if operation in ("fusion", "async-start"):
        # A collective may sit in a fusion with what comes before or after it, or in the body of an asynchronous call.
        carrier = next((i for i in program.inner(instruction) if i.operation.removesuffix("-start") in KINDS), None)
        if carrier is None:
            return None
    kind = carrier.operation.removesuffix("-start")
    if kind not in KINDS or operation.endswith("-done"):
        return None
    result = _last_array(carrier.result) if carrier.operation.endswith("-start") else carrier.result
    source = carrier.jax_name or instruction.jax_name
    return Collective(kind, result, size(result), 1, operation.endswith("-start"), 0, source, _group(carrier.rest))


def _walk(program: Program, name: str, times: int) -> Iterator[Collective]:
    body = program.body(name)
    for place, instruction in enumerate(body):
        if instruction.operation == "while":
            turns = program.turns(instruction) or 1
            yield from _walk(program, instruction.called("body")[0], times * turns)
        elif instruction.operation in ("call", "conditional"):
            for called in instruction.called(*_BRANCHES):
                yield from _walk(program, called, times)
        elif collective := collective_of(program, instruction):
            overlapped = _products_until_done(program, body, place) if collective.is_async else 0
            yield dataclasses.replace(collective, times=times, overlapped=overlapped)


def _products_until_done(program: Program, body: list[Instruction], place: int) -> int:
    """Matrix products, loops and kernels in the schedule between a start and its done."""
    start, products = body[place], 0
    for instruction in body[place + 1 :]:
        if instruction.operation.endswith("-done") and start.name in instruction.operands:
            return products
        products += _is_product(program, instruction)
    return 0


def _is_product(program: Program, instruction: Instruction) -> bool:
    if instruction.operation in ("convolution", "dot", "while"):
        return True
    if instruction.operation == "custom-call":
        return "tpu_custom_call" in instruction.rest
    return any(i.operation in ("convolution", "dot") for i in program.inner(instruction))


def _group(attributes: str) -> tuple[int, ...]:
    """Places in the mesh of the first group, from any of the three ways in which XLA writes groups."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes):
        return tuple(int(n) for n in listed[1].split(","))
    if tiled := re.search(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", attributes):
        shape, source, order = ([int(n) for n in text.split(",")] if text else None for text in tiled.groups())
        devices = np.arange(np.prod(source)).reshape(source)
        return tuple((devices.transpose(order) if order else devices).reshape(shape)[0].tolist())
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {name: int(count) for name, count in re.findall(r"'([^']+)'=(\d+)", named[1])}
        chosen = re.findall(r"'([^']+)'", named[2])
        devices = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
        first = tuple(slice(None) if name in chosen else 0 for name in sizes)
        return tuple(devices[first].reshape(-1).tolist())
    return ()


def _last_array(result: str) -> str:
    """What a start leaves behind: of (operands, results, ...), the results."""
    found = [a for a in arrays(result) if a.shape]
    if len(found) < 2:
        return result
    half = found[len(found) // 2 :]
    return ", ".join(f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in half[: max(1, len(found) // 2)])
