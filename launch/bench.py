"""Measures mmx on this machine, side by side with others.

  python -m launch.bench --cpu
  python -m launch.bench --gpu --output=gpu.json
  python -m launch.bench --parallel
  python -m launch.bench --conversion
  python -m launch.bench --kernels
  python -m launch.bench --mixture

On a CPU: tokens a second of a training step, a prefill and a decode step against Transformers' MiniMaxForCausalLM in
PyTorch (where both are installed) on the same small hybrid, and how the time per token grows with the length.

On a GPU: the model's numbers against the CPU's, the quickstart on both, lightning attention beside FLA and
jax-linear-attention (where they are installed), forms of the experts' product, and training steps of
configs/text_1b.py with a profile; with several GPUs, meshes over all of them.

On eight virtual CPU devices: LASP+ against LASP, ring attention's balance in each layout of the sequence, and (where
libtpu is installed, from the program that it compiles) what of the exchange of tokens overlaps the experts.

Conversion: speed and memory of launch.convert both ways on 3.8 GB of made-up weights, beside safetensors alone.

Of the TPU kernels: time a token and head beside the floor, predicted by the compiler for every chip on any machine with
libtpu, measured for the TPU that the machine has.

Of the long-context mixtures: the shares of the tokens that the loader delivers in each stage, beside the report's.
"""

import json
import os
import sys
from glob import glob
from pathlib import Path

from absl import flags

from launch import program
from mmx.bench.gpu.sections import SECTIONS, report
from mmx.config import ConfigError, nearest

_CPU = flags.DEFINE_bool("cpu", False, "Measure on the CPU against Transformers; about twenty minutes.")
_GPU = flags.DEFINE_bool(
    "gpu", False, "Check and measure on this host's GPUs; about fourteen minutes, FLA's tuning takes four of them."
)
_PARALLEL = flags.DEFINE_bool("parallel", False, "Compare ways to spread work, on virtual devices; three minutes.")
_CONVERSION = flags.DEFINE_bool("conversion", False, "Measure launch.convert; two minutes and 12 GB of disk.")
_KERNELS = flags.DEFINE_bool("kernels", False, "Predict the TPU kernels' times, or measure them on a TPU; minutes.")
_MIXTURE = flags.DEFINE_bool("mixture", False, "Count what the loader delivers of the long-context mixtures; a minute.")
_ROWS = flags.DEFINE_integer("rows", 10_000, "Rows of each stage that --mixture reads.", lower_bound=10)
_CHIPS = flags.DEFINE_list("chips", ["v5e", "v5p", "v6e", "tpu7x"], "TPUs of the kernels' report.")
_SECTIONS = flags.DEFINE_list("sections", list(SECTIONS), "Sections of the GPU report, in this order.")
_SECTION_SECONDS = flags.DEFINE_float("section_seconds", 400, "Most that one section of the GPU report may take.")
_LENGTHS = flags.DEFINE_list("lengths", ["1024", "4096", "16384"], "Tokens of a training step and of a prefill.")
_TURNS = flags.DEFINE_integer("turns", 2, "Turns of each contestant at each length.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "CPU cores that each contestant may use.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results.")

# Large pages for large arrays, for all contestants alike. The C library reads it when a process starts.
_LARGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


# One piece: arrays of 16 GiB do not fit into what pieces of 4 GiB leave.
_GPU_MEMORY = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.97"}


def run() -> None:
    """Runs the chosen part."""
    chosen = [measure for flag, measure in _PARTS if flag.value]
    if len(chosen) != 1:
        names = [f"--{flag.name}" for flag, _ in _PARTS]
        raise ConfigError(f"choose one thing to measure: {', '.join(names[:-1])} or {names[-1]}")
    chosen[0]()
    if _OUTPUT.value:
        print(f"wrote {_OUTPUT.value}", file=sys.stderr)


def _on_cpu() -> None:
    try:
        lengths = sorted({int(length) for length in _LENGTHS.value})
    except ValueError:
        raise ConfigError(f"--lengths={','.join(_LENGTHS.value)}: write numbers, as in --lengths=1024,4096") from None
    os.environ.setdefault(*_LARGE_PAGES)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from mmx.bench.contest import contest, growth

    results = contest(lengths, _TURNS.value, _THREADS.value, _say)
    for work, rates in results["tokens_per_second"].items():
        if len(rates) > 1:
            shares = ", ".join(f"{name} {growth(rates, name):.0%}" for name in results["contestants"])
            _say(f"{work}: throughput at {max(rates):,} tokens over that at {min(rates):,}: {shares}")
    _write(results)


def _on_gpu() -> None:
    for name in _SECTIONS.value:
        if name not in SECTIONS:
            raise ConfigError(f"--sections: there is no section {name!r}{nearest(name, SECTIONS)}")
    for variable, value in _GPU_MEMORY.items():
        os.environ.setdefault(variable, value)
    report(_SECTIONS.value, _SECTION_SECONDS.value, _say, Path(_OUTPUT.value) if _OUTPUT.value else None)


def _on_virtual_devices() -> None:
    from mmx.bench.parallel.report import report

    report(_say, Path(_OUTPUT.value) if _OUTPUT.value else None)


def _of_conversion() -> None:
    from mmx.bench.conversion import measure

    _write(measure(_TURNS.value, _say))


def _of_kernels() -> None:
    if not (glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")):
        # Asked without a TPU, libtpu looks for one and complains at length.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from mmx.bench.kernels import REFERENCES, reason_not_to, report

    for name in _CHIPS.value:
        if name not in REFERENCES:
            raise ConfigError(f"--chips: there are no figures of {name!r}{nearest(name, REFERENCES)}")
    if reason := reason_not_to():
        raise ConfigError(f"--kernels: {reason}")
    _write(report(_CHIPS.value, _say))


def _of_mixtures() -> None:
    from mmx.bench.mixture import measure

    _write(measure(_ROWS.value, _say))


_PARTS = (
    (_CPU, _on_cpu),
    (_GPU, _on_gpu),
    (_PARALLEL, _on_virtual_devices),
    (_CONVERSION, _of_conversion),
    (_KERNELS, _of_kernels),
    (_MIXTURE, _of_mixtures),
)


def _write(results: object) -> None:
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(results, indent=2) + "\n")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    program.main(run)
