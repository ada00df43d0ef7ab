"""What may be asked for: TPU generations, their sizes, runtime versions and zones, from the table in accelerators.json.

A type such as ``v5p-1024`` counts TensorCores (two a chip) on v4 and v5p, and chips on v5e and v6e.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

from mmx.config import ConfigError, nearest

_TABLE = Path(__file__).with_name("accelerators.json")
_CORES_PER_CHIP = 2
_CHIPS_PER_HOST = 4
# One host holds up to this many chips of the generations that count chips.
_CHIPS_OF_ONE_HOST = 8


@dataclasses.dataclass(frozen=True)
class Family:
    """A TPU generation, as the table has it."""

    name: str
    spelling: str  # how its types begin
    counts: str  # what the number in a type counts: cores or chips
    small: tuple[int, ...]  # sizes below the first multiple
    multiple: int | None  # larger sizes are multiples of this
    largest: int
    runtime_version: str  # for JAX
    zones: tuple[str, ...]

    def has(self, size: int) -> bool:
        """Whether the type of this size exists."""
        is_multiple = self.multiple is not None and size > 0 and size % self.multiple == 0
        return size in self.small or (is_multiple and size <= self.largest)

    def sizes(self) -> str:
        """The sizes, for a message."""
        listed = ", ".join(f"{self.spelling}{size}" for size in self.small)
        return listed if self.multiple is None else f"{listed} and multiples of {self.multiple} up to {self.largest}"


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One slice."""

    family: Family
    size: int

    @property
    def chips(self) -> int:
        """Chips of a slice."""
        return self.size // _CORES_PER_CHIP if self.family.counts == "cores" else self.size

    @property
    def hosts(self) -> int:
        """Hosts of a slice, one process each."""
        one_host = self.family.counts == "chips" and self.chips <= _CHIPS_OF_ONE_HOST
        return 1 if one_host else self.chips // _CHIPS_PER_HOST


@functools.cache
def families() -> dict[str, Family]:
    """All generations by name."""
    rows = json.loads(_TABLE.read_text())["families"]
    return {
        name: Family(name, **(row | {"small": tuple(row["small"]), "zones": tuple(row["zones"])}))
        for name, row in rows.items()
    }


def find_accelerator(accelerator_type: str) -> Accelerator:
    """Reads a type such as ``v5p-1024``.

    Raises:
      ConfigError: if there is none of this name or size; the message says which there are.
    """
    generation, _, size = accelerator_type.rpartition("-")
    if generation.startswith(("tpu7", "v7", "ironwood")):
        raise ConfigError(f"{accelerator_type}: TPU7x is rented through GKE alone; see launch/jobset.yaml")
    by_spelling = {family.spelling.removesuffix("-"): family for family in families().values()}
    if generation not in by_spelling:
        hint = nearest(generation, by_spelling) if generation != "v5e" else "; v5e is spelt 'v5litepod-N'"
        raise ConfigError(f"accelerator type {accelerator_type!r} is not known{hint}")
    family = by_spelling[generation]
    if not size.isdigit() or not family.has(int(size)):
        raise ConfigError(
            f"accelerator type {accelerator_type!r} does not exist: {family.name} counts {family.counts} and has "
            f"{family.sizes()}"
        )
    return Accelerator(family, int(size))


def check_runtime_version(version: str, family: Family) -> bool:
    """Whether the version is the one documented for the generation; gcloud can be asked about others.

    Raises:
      ConfigError: if it is the one of another generation.
    """
    for other in families().values():
        if version == other.runtime_version != family.runtime_version:
            raise ConfigError(
                f"runtime version {version!r} is for {other.name}: {family.name} takes {family.runtime_version!r}"
            )
    return version == family.runtime_version
