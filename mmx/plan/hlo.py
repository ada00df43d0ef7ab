"""A compiled TPU program as text, read: computations in the order of the schedule, loops and how often they turn.

The compiler's own cost analysis counts a loop's body once. Whoever walks a program from its entry with ``turns`` counts
it as often as it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-<>]+) \(.*\{\s*$")
_START = re.compile(r"^\s+(ROOT )?%[\w.\-]+ = ")
_INSTRUCTION = re.compile(r"^(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", re.DOTALL)
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\](?:\{([0-9,]*)((?::[^}]*)?)\})?")
_TABLE_ROW = re.compile(r"^(\d+) (.*)$")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type."""

    dtype: str
    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    layout: str  # tiles and memory space, as XLA writes them

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return _BYTES[self.dtype] * math.prod(self.shape)

    @property
    def padded_size(self) -> int:
        """Bytes that it takes in memory: the first tile covers the most minor dimensions, whole tiles only."""
        tile = re.search(r"T\(([0-9,]+)\)", self.layout)
        if not tile or not self.shape:
            return self.size
        shape = [self.shape[axis] for axis in self.minor_to_major]
        for place, width in enumerate(reversed([int(n) for n in tile[1].split(",")])):
            if place < len(shape):
                shape[place] = -(-shape[place] // width) * width
        return _BYTES[self.dtype] * math.prod(shape)

    @property
    def in_hbm(self) -> bool:
        """False for what lies in a core's own memory, or in the host's."""
        return "S(" not in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    result: str  # its type, as XLA writes it
    operation: str
    rest: str  # operands, attributes and metadata
    is_root: bool

    def called(self, *attributes: str) -> list[str]:
        """Computations that the attributes name, alone or in braces."""
        found = []
        for attribute in attributes:
            for group, name in re.findall(rf"\b{attribute}=(?:{{([^}}]*)}}|%?([\w.\-]+))", self.rest):
                found += re.findall(r"[\w.\-]+", group or name)
        return found

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth, end = 1, len(self.rest)
        for place, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                end = place
                break
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate of the clock cycles that it takes once, where there is one."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    @property
    def jax_name(self) -> str:
        """The operation in our code that it comes from, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A scheduled program."""

    computations: dict[str, list[Instruction]]
    entry: str
    frames: dict[int, tuple[tuple[str, int], ...]]  # stack frame id to (file, line), innermost first

    def body(self, name: str) -> list[Instruction]:
        """Instructions of a computation; none for one that the text lacks."""
        return self.computations.get(name, [])

    def inner(self, instruction: Instruction) -> list[Instruction]:
        """Instructions of the computation that a fusion or an asynchronous call wraps, and of those within."""
        found = []
        for name in instruction.called("calls"):
            for inside in self.body(name):
                found += [inside, *self.inner(inside)]
        return found

    def turns(self, loop: Instruction) -> int | None:
        """How often a loop turns that counts up to a constant; None where data decide.

        The constant stands in the loop's condition, or in a fusion called from there.
        """
        condition = loop.called("condition")[0]
        names = [condition, *(n for i in self.body(condition) for n in i.called("calls"))]
        constants = [
            int(number[1])
            for name in names
            for i in self.body(name)
            if i.operation == "constant" and (number := re.match(r"(\d+)\)", i.rest))
        ]
        return max(constants, default=None)

    def source(self, instruction: Instruction) -> tuple[tuple[str, int], ...]:
        """Files and lines of our code that an instruction comes from, innermost first; nothing where it is unknown."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        if frame:
            return self.frames.get(int(frame[1]), ())
        file = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.rest)
        return ((file[1], int(file[2])),) if file else ()


def parse(text: str) -> Program:
    """Reads ``jax.stages.Compiled.as_text()`` of a program compiled for TPU."""
    lines: dict[str, list[str]] = {}
    tables: dict[str, dict[int, str]] = {}
    current, entry, table = None, "", ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
        elif header and not line.startswith(" "):
            current = header.group(2)
            lines[current] = []
            entry = current if header.group(1) else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and _START.match(line):
            lines[current].append(line.strip())
        elif current is not None and lines[current]:
            lines[current][-1] += " " + line.strip()  # Metadata of a kernel may hold line breaks.
        elif current is None and (row := _TABLE_ROW.match(line)):
            tables.setdefault(table, {})[int(row[1])] = row[2]
    parsed = {
        name: [
            Instruction(*match.groups()[1:], is_root=bool(match[1]))
            for text in texts
            if (match := _INSTRUCTION.match(text))
        ]
        for name, texts in lines.items()
    }
    return Program(parsed, entry, _frames(tables))


def arrays(result: str) -> list[Array]:
    """The arrays of a type, in order."""
    numbers = lambda text: tuple(int(n) for n in text.split(",") if n)  # noqa: E731
    return [
        Array(dtype, numbers(shape), numbers(order or ""), layout or "")
        for dtype, shape, order, layout in _ARRAY.findall(result)
        if dtype in _BYTES
    ]


def size(result: str) -> int:
    """Bytes of a type's numbers."""
    return sum(array.size for array in arrays(result))


def project_path(file: str) -> str:
    """A file of ours as the repository has it; another as it is."""
    for root in ("/pallas_kernels/", "/mmx/"):
        if root in file:
            return root[1:] + file.rpartition(root)[2]
    return file


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[tuple[str, int], ...]]:
    number = lambda name, text: int(found[1]) if (found := re.search(rf"{name}=(\d+)", text)) else 0  # noqa: E731
    files = {key: text.strip('"') for key, text in tables.get("FileNames", {}).items()}
    places = {
        key: (files.get(number("file_name_id", text), ""), number("line", text))
        for key, text in tables.get("FileLocations", {}).items()
    }
    frames = tables.get("StackFrames", {})
    # Some versions of XLA write one more than the caller's number, so that a frame may seem to call itself.
    off = any(number("parent_frame_id", text) == key for key, text in frames.items())
    found: dict[int, tuple[tuple[str, int], ...]] = {}

    def stack(key: int) -> tuple[tuple[str, int], ...]:
        if key not in found:
            text = frames.get(key, "")
            place, parent = places.get(number("file_location_id", text)), number("parent_frame_id", text) - off
            rest = stack(parent) if 0 < parent < key else ()
            found[key] = (place, *rest) if place else rest
        return found[key]

    for key in sorted(frames):
        stack(key)
    return found
