"""Searches the sizes that the TPU kernels run with, and writes them into their tables.

  python -m pallas_kernels.tune                        every chip, by the compiler's static cycle counts, on any machine
  python -m pallas_kernels.tune --chips=v5e --time     by time, on the TPU that is here
  python -m pallas_kernels.tune --kernels=softmax      splash attention's blocks alone; "grouped": the experts' tiles

The experts' tiles are never timed: the kernels that are counted only stand for megablox's. Rows of the tables that are
not searched stay.
"""

import argparse
import sys

from pallas_kernels.aot import CHIPS, missing_compiler
from pallas_kernels.grouped_matmul import tpu_search as grouped_search
from pallas_kernels.lightning_attention import tpu_search as lightning_search
from pallas_kernels.lightning_attention.tpu_figures import Call
from pallas_kernels.lightning_attention.tpu_tiles import DEFAULT, padded
from pallas_kernels.platform import one_spelling
from pallas_kernels.softmax_attention import tpu_search as softmax_search

_KERNELS = ("lightning", "softmax", "grouped")


def main(arguments: list[str]) -> int:
    """Runs the search; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", default=",".join(_KERNELS), help="whose sizes to search for")
    parser.add_argument("--chips", default="v5e,v5p,v6e,tpu7x", help="chips to search for")
    parser.add_argument("--dtypes", default="bfloat16", help="of q, k and v, and of the experts' operands")
    parser.add_argument("--head_sizes", default="128x128", help="key x value channels of a head")
    parser.add_argument("--tokens", type=int, default=4096, help="length of lightning attention's row")
    parser.add_argument("--heads", type=int, default=8, help="heads of that row")
    parser.add_argument("--time", action="store_true", help="time the TPU that is here instead of reading cycle counts")
    options = parser.parse_args(arguments)
    for flag, known in (("chips", CHIPS), ("kernels", _KERNELS)):
        unknown = [name for name in getattr(options, flag).split(",") if name not in known]
        if unknown:
            return _fail(f"--{flag}: {unknown[0]!r} is not one of {', '.join(known)}")
    if not options.time and (reason := missing_compiler()):
        return _fail(reason)
    if options.time and (reason := _no_such_tpu(options.chips)):
        return _fail(reason)
    kernels = options.kernels.split(",")
    if options.time:
        kernels = [name for name in kernels if name != "grouped"]
        if not kernels:
            return _fail("--time: the experts' tiles are counted, never timed; leave it out")
    for name in options.chips.split(","):
        for dtype in options.dtypes.split(","):
            for size in options.head_sizes.split(","):
                key, value = (int(channels) for channels in size.split("x"))
                if "lightning" in kernels:
                    sizes = padded(key), padded(value), dtype
                    call = Call("forward", options.tokens, options.heads, DEFAULT, *sizes)
                    lightning_search.search(CHIPS[name], call, options.time)
                if "softmax" in kernels:
                    softmax_search.search(CHIPS[name], dtype, max(key, value), options.time)
            if "grouped" in kernels:
                grouped_search.search(CHIPS[name], dtype)
    return 0


def _no_such_tpu(chips: str) -> str | None:
    import jax

    kind = one_spelling(jax.devices()[0].device_kind)
    if [CHIPS[name].device_kind for name in chips.split(",")] == [kind]:
        return None
    return f"--time: the device here is {kind!r}; give --chips the one name that it has"


def _fail(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
