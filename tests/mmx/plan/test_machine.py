"""Names of machines, and where messages go on them."""

import numpy as np
import pytest

from mmx.config import ConfigError
from mmx.plan.collectives import Collective
from mmx.plan.links import Torus
from mmx.plan.machine import parse_machine
from pallas_kernels.aot.chips import CHIPS


@pytest.mark.parametrize(
    ("name", "devices", "chips", "cores"),
    [
        ("v5p:8x8x16", 1024, 1024, 2048),
        ("tpu7x:4x4x4", 128, 64, 128),
        ("v6e:16x16", 256, 256, 256),
        ("h100:64", 64, 64, 64),
    ],
)
def test_counts_devices_chips_and_cores(name, devices, chips, cores):
    machine = parse_machine(name)
    assert (machine.devices, machine.chips, machine.cores) == (devices, chips, cores)


@pytest.mark.parametrize("name", ["v5litepod:4x4", "v9:2x2x2", "v5p:8x8", "v5p", "h100:8x8", "v5p:0x2x2"])
def test_unknown_names_are_answered_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=r"v5p:4x4x8.*h100:64"):
        parse_machine(name)


class Device:
    """What a topology's device says of itself."""

    slice_index = 0

    def __init__(self, coords):
        self.coords = list(coords)


def torus(shape=(4, 4, 4), axes=None) -> Torus:
    return Torus(CHIPS["v5p"], [Device(c) for c in np.ndindex(*shape)], axes or dict(zip("abc", shape, strict=True)))


def collective(kind: str, group, size: int = 10**9) -> Collective:
    return Collective(kind, "", size, 1, False, 0, "", tuple(group))


def test_a_ring_that_closes_uses_both_directions():
    # The last axis of the mesh lies along z: four neighbours on a closed ring, two links of 100 GB/s.
    assert torus().seconds(collective("all-gather", [0, 1, 2, 3])) == pytest.approx(1e9 * 3 / 4 / 200e9)
    # Half of it is a line of one link.
    assert torus().seconds(collective("all-gather", [0, 1])) == pytest.approx(1e9 / 2 / 100e9)
    # Cubes of four alone close.
    assert torus((2, 2, 2)).seconds(collective("all-gather", [0, 1])) == pytest.approx(1e9 / 2 / 100e9)


def test_kinds_differ_by_what_they_carry():
    group = [0, 1, 2, 3]
    gather, scatter, reduce = (
        torus().seconds(collective(kind, group)) for kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    assert scatter == pytest.approx(4 * gather)  # Its size is that of the part it leaves.
    assert reduce == pytest.approx(2 * gather)
    # All-to-all on a closed ring of four: a quarter of the half that crosses, both ways.
    assert torus().seconds(collective("all-to-all", group)) == pytest.approx(1e9 / 100e9 * 4 / 4 / 2)
    assert torus().seconds(collective("collective-permute", [0, 1])) == pytest.approx(1e9 / 100e9)
    assert torus().seconds(collective("collective-permute", [0, 3])) == pytest.approx(1e9 / 100e9)  # Round the ring.
    assert torus().seconds(collective("collective-permute", [0, 2])) == pytest.approx(2e9 / 100e9)


def test_three_dimensions_carry_three_times_as_much():
    everyone, line = range(64), range(4)
    whole, one = (torus().seconds(collective("all-gather", group)) for group in (everyone, line))
    assert whole * 3 / (63 / 64) == pytest.approx(one / (3 / 4))


def test_says_which_axes_and_links():
    assert torus().mesh_axes([0, 1, 2, 3]) == ("c",)
    assert torus().route(collective("all-gather", [0, 16])).crosses == "ICI x 2 of 4"
    assert set(torus().mesh_axes(range(64))) == {"a", "b", "c"}
