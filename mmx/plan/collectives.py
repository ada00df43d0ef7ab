"""The collective operations of a compiled TPU program, and how much of them runs beside computation.

The compiler's own cost analysis counts a loop's body once. Here the scheduled program is walked from its entry and
every loop's body counts as often as the loop turns, which TPU programs say in the loop's condition.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\{\s*$")
_START = re.compile(r"^\s+(ROOT )?%[\w.\-]+ = ")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", re.DOTALL)
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\]")


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


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    operation: str
    rest: str

    def called(self, *attributes: str) -> list[str]:
        """Computations that the attributes name, alone or in braces."""
        found = []
        for attribute in attributes:
            for group, name in re.findall(rf"{attribute}=(?:{{([^}}]*)}}|%?([\w.\-]+))", self.rest):
                found += re.findall(r"[\w.\-]+", group or name)
        return found


def collectives(program: str) -> list[Collective]:
    """The collectives that one run of a program executes.

    Args:
      program: ``jax.stages.Compiled.as_text()`` of a program compiled for TPU.
    """
    computations, entry = _parse(program)
    return list(_walk(computations, entry, 1))


def moved(found: list[Collective]) -> Mapping[str, tuple[int, int]]:
    """Kind to how often a step runs it and how many bytes it leaves on a device in all."""
    totals: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for collective in found:
        totals[collective.kind][0] += collective.times
        totals[collective.kind][1] += collective.times * collective.size
    return {kind: (times, size) for kind, (times, size) in totals.items()}


def _parse(program: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions of each computation in the order of the schedule, and the entry's name."""
    lines: dict[str, list[str]] = {}
    current, entry = None, ""
    for line in program.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            current = header.group(2)
            lines[current] = []
            entry = current if header.group(1) else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and _START.match(line):
            lines[current].append(line.strip())
        elif current is not None and lines[current]:
            lines[current][-1] += " " + line.strip()  # Metadata of a kernel may hold line breaks.
    parsed = {
        name: [_Instruction(*match.groups()) for text in texts if (match := _INSTRUCTION.match(text))]
        for name, texts in lines.items()
    }
    return parsed, entry


def _walk(computations: dict[str, list[_Instruction]], name: str, times: int) -> Iterator[Collective]:
    body = computations.get(name, [])
    for place, instruction in enumerate(body):
        if instruction.operation == "while":
            turns = _turns(computations, instruction.called("condition")[0])
            yield from _walk(computations, instruction.called("body")[0], times * turns)
        elif instruction.operation in ("call", "conditional"):
            attributes = ("to_apply", "true_computation", "false_computation", "branch_computations")
            for called in instruction.called(*attributes):
                yield from _walk(computations, called, times)
        else:
            yield from _collective(computations, body, place, times)


def _collective(
    computations: dict[str, list[_Instruction]], body: list[_Instruction], place: int, times: int
) -> Iterator[Collective]:
    instruction = body[place]
    operation, carrier = instruction.operation, instruction
    if operation in ("fusion", "async-start"):
        # A collective may sit in a fusion with what comes before or after it, or in the body of an asynchronous call.
        inner = [i for called in instruction.called("calls") for i in computations.get(called, [])]
        carrier = next((i for i in inner if i.operation.removesuffix("-start") in KINDS), None)
        if carrier is None:
            return
    kind = carrier.operation.removesuffix("-start")
    if kind not in KINDS or operation.endswith("-done"):
        return
    is_async = operation.endswith("-start")
    result = _last_array(carrier.result) if carrier.operation.endswith("-start") else carrier.result
    source = re.search(r'op_name="([^"]*)"', carrier.rest) or re.search(r'op_name="([^"]*)"', instruction.rest)
    overlapped = _products_until_done(computations, body, place) if is_async else 0
    yield Collective(kind, result, _size(result), times, is_async, overlapped, source.group(1) if source else "")


def _products_until_done(computations: dict[str, list[_Instruction]], body: list[_Instruction], place: int) -> int:
    """Matrix products, loops and kernels in the schedule between a start and its done."""
    start, products = body[place], 0
    for instruction in body[place + 1 :]:
        if instruction.operation.endswith("-done") and re.search(rf"%{re.escape(start.name)}\b", instruction.rest):
            return products
        products += _is_product(computations, instruction)
    return 0


def _is_product(computations: dict[str, list[_Instruction]], instruction: _Instruction) -> bool:
    if instruction.operation in ("convolution", "dot", "while"):
        return True
    if instruction.operation == "custom-call":
        return "tpu_custom_call" in instruction.rest
    if instruction.operation != "fusion":
        return False
    inner = [i for called in instruction.called("calls") for i in computations.get(called, [])]
    return any(i.operation in ("convolution", "dot") for i in inner)


def _turns(computations: dict[str, list[_Instruction]], condition: str) -> int:
    """Turns of a loop that counts up to a constant, which stands in its condition or in a fusion called from there."""
    names = [condition, *(n for i in computations.get(condition, []) for n in i.called("calls"))]
    constants = [
        int(number.group(1))
        for name in names
        for i in computations.get(name, [])
        if i.operation == "constant" and (number := re.match(r"(\d+)\)", i.rest))
    ]
    return max(constants, default=1)


def _last_array(result: str) -> str:
    """What a start leaves behind: of (operands, results, ...), the results."""
    arrays = [f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(result) if dtype in _BYTES and shape]
    return arrays[len(arrays) // 2] if len(arrays) > 1 else result


def _size(result: str) -> int:
    dimensions = lambda shape: (int(d) for d in shape.split(",") if d)  # noqa: E731
    return sum(_BYTES.get(dtype, 0) * math.prod(dimensions(shape)) for dtype, shape in _ARRAY.findall(result))
