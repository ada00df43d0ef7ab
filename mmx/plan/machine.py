"""A named machine: so many devices of a chip, or of a GPU, and how fast they are."""

from __future__ import annotations

import dataclasses
import math
import re

from mmx.config import ConfigError, nearest
from pallas_kernels.aot.chips import CHIPS, GPUS, Chip, Gpu


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a plan is made for."""

    name: str
    part: Chip | Gpu
    devices: int
    chips: int
    shape: tuple[int, ...]  # of the torus; of GPUs, their number alone

    @property
    def is_tpu(self) -> bool:
        """Whether a program can be compiled for it here."""
        return isinstance(self.part, Chip)

    @property
    def cores(self) -> int:
        """TensorCores, as Google counts them in the names of v4 and v5p slices; of GPUs, their number."""
        two = self.is_tpu and self.part.name in ("v4", "v5p", "tpu7x")
        return self.chips * (2 if two else 1)

    def gather_bandwidth(self, group: int) -> float:
        """Bytes/s that a device of a group receives in an all-gather, or sends in a reduce-scatter."""
        if not self.is_tpu:
            return self.part.nvlink if group <= self.part.node else self.part.network
        sides = self.part.dimensions if group >= 2**self.part.dimensions else max(1, int(math.log2(max(group, 2))))
        return 2 * sides * self.part.link / (self.devices // self.chips)

    def all_to_all_bandwidth(self, group: int) -> float:
        """Bytes/s that a device of a group sends in an all-to-all: what the middle of a near-cubic box carries."""
        if not self.is_tpu:
            return self.part.nvlink if group <= self.part.node else self.part.network
        side = max(2.0, group ** (1 / self.part.dimensions))
        return 8 * self.part.link / side / (self.devices // self.chips)


def parse_machine(text: str) -> Machine:
    """A machine from "v5p:8x8x16" or "h100:64".

    Raises:
      ConfigError: for a name that is unknown or no shape, with the names that there are.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", text)
    known = ", ".join(f"{name}:{_example(chip)}" for name, chip in CHIPS.items())
    spelling = (
        f"TPUs are spelled like {known} (chips along each dimension), GPUs like {', '.join(f'{g}:64' for g in GPUS)}"
    )
    if not match or match[1] not in CHIPS | GPUS:
        hint = nearest(text.partition(":")[0], [*CHIPS, *GPUS])
        raise ConfigError(f"--topology={text!r} is unknown{hint}: {spelling}")
    part = CHIPS.get(match[1]) or GPUS[match[1]]
    shape = tuple(int(n) for n in match[2].split("x"))
    count = math.prod(shape)
    if (
        count < 1
        or (isinstance(part, Chip) and len(shape) != part.dimensions)
        or (isinstance(part, Gpu) and len(shape) != 1)
    ):
        raise ConfigError(f"--topology={text!r} has the wrong number of dimensions: {spelling}")
    per_chip = 2 if part.name in ("v4", "tpu7x") else 1
    return Machine(text, part, count * per_chip, count, shape)


def _example(chip: Chip) -> str:
    return "x".join(["4", "4", "8"] if chip.dimensions == 3 else ["8", "16"])
