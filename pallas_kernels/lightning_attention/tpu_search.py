"""Searches the sizes that lightning attention's kernels run with, and writes them into their table.

From a starting point one size is changed at a time, and kept where that is faster, until nothing is. Both kernels share
the block, so the search is done for each block and the best sum taken.
"""

import dataclasses
from collections.abc import Callable

import jax

from pallas_kernels.aot import Chip, ProfileError, compiler_version
from pallas_kernels.lightning_attention.tpu_figures import Call
from pallas_kernels.lightning_attention.tpu_tiles import DEFAULT, TABLE
from pallas_kernels.size_table import renew_row

_BLOCKS = (512, 1024)
_CHOICES = {"lag": (1, 2, 3, 4), "heads": (2, 4, 8), "fused": (False, True), "chunk": (128, 256)}


def search(chip: Chip, call: Call, timed: bool) -> None:
    """Renews the row of ``call``'s dtype and head sizes, by time on the chip that is here or by static cycles."""
    known: dict[Call, float] = {}

    def figure(call: Call) -> float:
        if call not in known:
            known[call] = _nanoseconds(chip, call, timed)
        return known[call]

    best = None
    for block in _BLOCKS:
        pair = []
        for kernel in ("forward", "backward"):
            tiles = dataclasses.replace(DEFAULT, block=block)
            start = dataclasses.replace(call, kernel=kernel, keep_states=kernel == "forward", tiles=tiles)
            pair.append(_descend(start, figure))
        total = sum(ns for ns, _ in pair)
        if best is None or total < best[0]:
            best = (total, pair)
    (_, ((forward_ns, forward), (backward_ns, backward))) = best
    if max(forward_ns, backward_ns) == float("inf"):
        print(f"{chip.name} {call.dtype} {call.key}x{call.value}: nothing could be profiled; the table stays as it is")
        return
    row = {
        "device": chip.device_kind,
        "dtype": call.dtype,
        "key": call.key,
        "value": call.value,
        "forward": dataclasses.asdict(forward.tiles),
        "backward": dataclasses.asdict(backward.tiles),
        "ns_per_token_and_head": [round(forward_ns, 4), round(backward_ns, 4)],
        "by": f"time, {call.tokens} tokens" if timed else f"static cycles, libtpu {compiler_version()}",
    }
    renew_row(TABLE, row, ("device", "dtype", "key", "value"))


def _descend(call: Call, figure: Callable[[Call], float]) -> tuple[float, Call]:
    best, moved = figure(call), True
    while moved:
        moved = False
        for field, choices in _CHOICES.items():
            for choice in choices:
                if choice == getattr(call.tiles, field):
                    continue
                other = dataclasses.replace(call, tiles=dataclasses.replace(call.tiles, **{field: choice}))
                ns = figure(other)
                # A change has to be worth its noise in the model: half a percent.
                if ns < 0.995 * best:
                    best, call, moved = ns, other, True
    return best, call


def _nanoseconds(chip: Chip, call: Call, timed: bool) -> float:
    note = ""
    try:
        ns = call.measure() if timed else _balanced(chip, call)
    except (ProfileError, jax.errors.JaxRuntimeError) as error:
        ns, note = float("inf"), f"  {error}"[:160]
    sizes = " ".join(f"{field}={value}" for field, value in dataclasses.asdict(call.tiles).items())
    print(f"{chip.name} {call.dtype} {call.key}x{call.value} {call.kernel} {sizes}: {ns:.4f} ns{note}", flush=True)
    return ns


def _balanced(chip: Chip, call: Call) -> float:
    """Nanoseconds; where memory binds, the one with fewer cycles is a little better."""
    if call.heads // call.tiles.heads < chip.cores:
        return float("inf")
    cycles, ns = call.predict(chip)
    return ns + 1e-2 * cycles / chip.clock * 1e9 / call.token_heads
