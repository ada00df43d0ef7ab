"""Measures mmx on this machine, side by side with others.

  python -m launch.bench --cpu

On a CPU: tokens a second of a training step, a prefill and a decode step against Transformers' MiniMaxForCausalLM in
PyTorch (where both are installed) on the same small hybrid, and how the time per token grows with the length.
"""

import json
import os
import sys
from pathlib import Path

from absl import flags

from launch import program
from mmx.config import ConfigError

_CPU = flags.DEFINE_bool("cpu", False, "Measure on the CPU against Transformers; about ten minutes.")
_LENGTHS = flags.DEFINE_list("lengths", ["1024", "4096", "16384"], "Tokens of a training step and of a prefill.")
_TURNS = flags.DEFINE_integer("turns", 2, "Turns of each contestant at each length.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "CPU cores that each contestant may use.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results.")

# Large pages for large arrays, for all contestants alike. The C library reads it when a process starts.
_LARGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


def run() -> None:
    """Runs the chosen section."""
    if not _CPU.value:
        raise ConfigError("choose what to measure: --cpu")
    try:
        lengths = sorted({int(length) for length in _LENGTHS.value})
    except ValueError:
        raise ConfigError(f"--lengths={','.join(_LENGTHS.value)}: write numbers, as in --lengths=1024,4096") from None
    os.environ.setdefault(*_LARGE_PAGES)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from mmx.bench.contest import contest, growth

    results = contest(lengths, _TURNS.value, _THREADS.value, lambda line: print(line, flush=True))
    for work, rates in results["tokens_per_second"].items():
        if len(rates) > 1:
            shares = ", ".join(f"{name} {growth(rates, name):.0%}" for name in results["contestants"])
            print(f"{work}: throughput at {max(rates):,} tokens over that at {min(rates):,}: {shares}")
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=2) + "\n")
        print(f"wrote {_OUTPUT.value}", file=sys.stderr)


if __name__ == "__main__":
    program.main(run)
