"""Which links of a TPU slice a collective crosses, and how long it occupies them.

The compiler gives no time for collectives. Here the devices of a group are found on the torus and the busiest link is
counted: what must cross the group's narrowest cut, over what its links carry. It is the time of an algorithm that loses
nothing (no start-up, no uneven load), with all groups at once and nothing else on the links.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from mmx.plan.collectives import Collective
from pallas_kernels.aot.chips import Chip

# A slice of whole 4 x 4 x 4 cubes is closed to a torus; a two-dimensional one along sides of 16.
_CUBE, _POD_SIDE = 4, 16


@dataclasses.dataclass(frozen=True)
class Route:
    """Where a group's messages go."""

    devices: int
    extents: tuple[int, ...]  # of the group along each dimension of the torus
    crosses: str  # in words


class Torus:
    """The links between the devices of a mesh on one slice."""

    def __init__(self, chip: Chip, devices: Sequence[jax.Device], axes: dict[str, int]):
        """Takes devices in the order of the mesh, and the mesh's axes."""
        self.chip, self.axes = chip, axes
        coordinates = np.array([device.coords for device in devices])[:, : chip.dimensions]
        self._coordinates = coordinates - coordinates.min(0)
        self.shape = tuple(int(n) for n in self._coordinates.max(0) + 1)
        self.devices_per_chip = len(devices) // len({tuple(c) for c in self._coordinates.tolist()})
        self._slices = np.array([getattr(device, "slice_index", 0) for device in devices])
        closed = _CUBE if chip.dimensions == 3 else _POD_SIDE
        whole = all(n % _CUBE == 0 for n in self.shape) if chip.dimensions == 3 else True
        self.wraps = tuple(whole and n % closed == 0 for n in self.shape)

    def mesh_axes(self, group: Sequence[int]) -> tuple[str, ...]:
        """Mesh axes along which the members of a group differ."""
        places = np.array(np.unravel_index(np.array(group), tuple(self.axes.values())))
        return tuple(name for name, row in zip(self.axes, places, strict=True) if len(set(row.tolist())) > 1)

    def route(self, collective: Collective) -> Route:
        """Where a collective's messages go."""
        group = self._members(collective)
        if len(set(self._slices[group].tolist())) > 1:
            return Route(len(group), (), "the network between slices")
        extents = tuple(len(set(row.tolist())) for row in self._coordinates[group].T)
        names = [f"{'xyz'[d]} {n} of {self.shape[d]}" for d, n in enumerate(extents) if n > 1]
        return Route(len(group), extents, "ICI " + ", ".join(names) if names else "the links within a chip")

    def seconds(self, collective: Collective) -> float:
        """Time of one run of a collective."""
        group = self._members(collective)
        n, coordinates = len(group), self._coordinates[group]
        if n < 2 or len(set(map(tuple, coordinates.tolist()))) < 2:
            return 0.0
        # Devices of one chip share its links.
        link = self.chip.link / self.devices_per_chip
        if collective.kind == "collective-permute":
            distance = np.abs(coordinates[0] - coordinates[1])
            wrapped = np.array(self.shape) - distance
            hops = np.where(self.wraps, np.minimum(distance, wrapped), distance).sum()
            return collective.size * int(hops) / link
        if collective.kind in ("all-to-all", "ragged-all-to-all"):
            return collective.size / link * max(self._cut(row, d) for d, row in enumerate(coordinates.T))
        lanes = sum(self._lanes(row, d) for d, row in enumerate(coordinates.T))
        whole = collective.size * (n if collective.kind == "reduce-scatter" else 1)
        passes = 2 if collective.kind == "all-reduce" else 1
        return passes * whole * (n - 1) / n / (lanes * link)

    def _members(self, collective: Collective) -> list[int]:
        return list(collective.group) or list(range(len(self._coordinates)))

    def _lanes(self, row: np.ndarray, dimension: int) -> float:
        """Links that a ring along a dimension may use at once: two where it closes, one where it is a line."""
        count = len(set(row.tolist()))
        if count < 2:
            return 0.0
        stride = (int(row.max()) - int(row.min())) / (count - 1)  # Groups that interleave share the links.
        closed = self.wraps[dimension] and count * stride >= self.shape[dimension]
        return (2 if closed else 1) / max(1.0, stride)

    def _cut(self, row: np.ndarray, dimension: int) -> float:
        """What a link in the middle carries of an all-to-all, as a share of what one device sends."""
        count = len(set(row.tolist()))
        if count < 2:
            return 0.0
        return count / 4 / self._lanes(row, dimension)
