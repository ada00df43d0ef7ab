"""Searches the sizes that lightning attention's TPU kernels run with, and writes them into their table.

  python -m pallas_kernels.tune                        every chip, by the compiler's static cycle counts, on any machine
  python -m pallas_kernels.tune --chips=v5e --time     by time, on the TPU that is here

From a starting point one size is changed at a time, and kept where that is faster, until nothing is. Both kernels share
the block, so the search is done for each block and the best sum taken. Rows of the table that are not searched stay.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable

from pallas_kernels.aot import CHIPS, Chip, ProfileError, compiler_version, missing_compiler
from pallas_kernels.lightning_attention.tpu_figures import Call
from pallas_kernels.lightning_attention.tpu_tiles import DEFAULT, TABLE, padded

_BLOCKS = (512, 1024)
_CHOICES = {"lag": (1, 2, 3, 4), "heads": (2, 4, 8), "fused": (False, True), "chunk": (128, 256)}


def main(arguments: list[str]) -> int:
    """Runs the search; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", default="v5e,v5p,v6e,tpu7x", help="chips to search for")
    parser.add_argument("--dtypes", default="bfloat16", help="of q, k and v")
    parser.add_argument("--head_sizes", default="128x128", help="key x value channels of a head")
    parser.add_argument("--tokens", type=int, default=4096, help="length of the row that is profiled or timed")
    parser.add_argument("--heads", type=int, default=8, help="heads of that row")
    parser.add_argument("--time", action="store_true", help="time the TPU that is here instead of reading cycle counts")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.chips.split(",") if name not in CHIPS]
    if unknown:
        return _fail(f"--chips: {unknown[0]!r} is not one of {', '.join(CHIPS)}")
    if not options.time and (reason := missing_compiler()):
        return _fail(reason)
    if options.time and (reason := _no_such_tpu(options.chips)):
        return _fail(reason)
    for name in options.chips.split(","):
        for dtype in options.dtypes.split(","):
            for size in options.head_sizes.split(","):
                key, value = (padded(int(channels)) for channels in size.split("x"))
                call = Call("forward", options.tokens, options.heads, DEFAULT, key, value, dtype)
                _search(CHIPS[name], call, options.time)
    return 0


def _search(chip: Chip, call: Call, timed: bool) -> None:
    best = None
    for block in _BLOCKS:
        pair = []
        for kernel in ("forward", "backward"):
            start = dataclasses.replace(
                call,
                kernel=kernel,
                keep_states=kernel == "forward",
                tiles=dataclasses.replace(DEFAULT, block=block),
            )
            pair.append(_descend(start, lambda call: _figure(chip, call, timed)))
        total = sum(figure for figure, _ in pair)
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
    identity = ("device", "dtype", "key", "value")
    rows = [other for other in json.loads(TABLE.read_text())["tiles"] if any(other[f] != row[f] for f in identity)]
    rows = sorted([*rows, row], key=lambda row: [str(row[field]) for field in identity])
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    TABLE.write_text(f'{{"tiles": [\n  {lines}\n]}}\n')


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


_known: dict[tuple[str, Call], float] = {}


def _figure(chip: Chip, call: Call, timed: bool) -> float:
    if (chip.name, call) not in _known:
        note = ""
        try:
            ns = call.measure() if timed else _balanced(chip, call)
        except ProfileError as error:
            ns, note = float("inf"), f"  {error}"[:160]
        _known[chip.name, call] = ns
        sizes = " ".join(f"{field}={value}" for field, value in dataclasses.asdict(call.tiles).items())
        print(f"{chip.name} {call.dtype} {call.key}x{call.value} {call.kernel} {sizes}: {ns:.4f} ns{note}", flush=True)
    return _known[chip.name, call]


def _balanced(chip: Chip, call: Call) -> float:
    """Nanoseconds; where memory binds, the one with fewer cycles is a little better."""
    if call.heads // call.tiles.heads < chip.cores:
        return float("inf")
    cycles, ns = call.predict(chip)
    return ns + 1e-2 * cycles / chip.clock * 1e9 / call.token_heads


def _no_such_tpu(chips: str) -> str | None:
    import jax

    kind = jax.devices()[0].device_kind
    if [CHIPS[name].device_kind for name in chips.split(",")] == [kind]:
        return None
    return f"--time: the device here is {kind!r}; give --chips the one name that it has"


def _fail(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
