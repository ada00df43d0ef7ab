"""Collectives of a compiled program, read from its HLO."""

import math
import re
from typing import NamedTuple

import jax

_BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}
_LINE = re.compile(
    r"= (?P<shapes>\(?[^=]*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


class Collective(NamedTuple):
    kind: str
    dtype: str
    bytes: int  # of its result on one device


def collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    """Every collective of the program once, however often a loop runs it, largest first."""
    found = []
    for line in compiled.as_text().splitlines():
        match = _LINE.search(line)
        if match:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match["shapes"]):
                size = math.prod(int(n) for n in shape.split(",") if n) * _BYTES[dtype]
                found.append(Collective(match["kind"], dtype, size))
    return sorted(found, key=lambda c: -c.bytes)
