"""Says, from any machine and without the accelerators, what a training run needs on a named TPU slice or on GPUs.

  python -m launch.plan --config=configs/minimax_text_01.py --topology=v5p:8x8x16
  python -m launch.plan --config=configs/plans/extend_1m.py --topology=v5p:8x8x16 --output=json
  python -m launch.plan --config=configs/long_context.py --stage=128K --topology=v5p:8x8x16
  python -m launch.plan --config=configs/text_1b.py --topology=h100:8 --config.mesh.fsdp=8
  python -m launch.plan --config=configs/minimax_text_01.py --topology=v5p:8x8x16 --search
  python -m launch.plan --config=configs/plans/prefill_128k.py --topology=v5p:4x4x4 --work=prefill
  python -m launch.plan --config=configs/quickstart.py --topology=here
  python -m launch.plan --stages=all
  python -m launch.plan --calibrate

On TPU the real training step is compiled (pip install -e '.[tpu]'; minutes and some gigabytes for the 456B model): does
it fit, what holds the memory, what moves over which links and beside what, how long a step and the whole stage should
take. For GPUs the same is counted on paper and says so. Times and MFU are predictions; the honesty factor printed with
them is what the same predictor gets right of published figures. ``--topology=here`` holds the count on paper against a
measurement on this machine.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import program
from mmx.config import ConfigError, Run

if TYPE_CHECKING:
    from mmx.plan.machine import Machine
    from mmx.plan.report import Plan

_CONFIG = program.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice such as v5p:8x8x16 (chips), or GPUs such as h100:64.")
_OUTPUT = flags.DEFINE_enum("output", "text", ["text", "json"], "What to print.")
_WORK = flags.DEFINE_enum(
    "work", "train", ["train", "prefill", "decode"], "A training step, or a prefill or a decoded token of the batch."
)
_PICTURES = flags.DEFINE_string("pictures", None, "Folder for pictures of memory, time and prefill latency.")
_STAGE = flags.DEFINE_string("stage", None, "Which stage of a configuration that has several.")
_COMPILE = flags.DEFINE_bool("compile", True, "Compile the step; --nocompile counts on paper, in a second.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, batch sizes and remat policies; print the best few.")
_BEST = flags.DEFINE_integer("best", 5, "How many to print.", lower_bound=1)
_COMPILE_BEST = flags.DEFINE_integer("compile_best", 0, "How many of the best to compile.", lower_bound=0)
_STAGES = flags.DEFINE_list("stages", [], "Stages' plans to compile anew, or all; prints README's table.")
_CALIBRATE = flags.DEFINE_bool("calibrate", False, "Renew the honesty factor: two compilations, some minutes.")


def run() -> None:
    """Makes the plan and prints it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from mmx.plan.machine import parse_machine

    if _CALIBRATE.value:
        return _calibrate()
    if _STAGES.value:
        return _stages()
    config = _of_one_stage(program.require_config(_CONFIG.value))
    if not _TOPOLOGY.value:
        raise ConfigError("--topology is missing: give a TPU slice or GPUs, as in --topology=v5p:8x8x16")
    if _TOPOLOGY.value == "here":
        return _compare(config)
    machine = parse_machine(_TOPOLOGY.value)
    if _SEARCH.value:
        return _search(config, machine)
    from mmx.plan.report import compiled_plan, counted_plan

    if _WORK.value != "train":
        from mmx.plan.generation import generation_plan

        return _show(generation_plan(config, machine, _WORK.value, _note))
    compiles = machine.is_tpu and _COMPILE.value
    plan = compiled_plan(config, machine, _note) if compiles else counted_plan(config, machine)
    _show(plan)


def _of_one_stage(config: Run) -> Run:
    names = [stage.name for stage in config.stages]
    if _STAGE.value is None and not names:
        return config
    if _STAGE.value not in names:
        known = f"has {', '.join(names)}" if names else "has none"
        raise ConfigError(f"--stage={_STAGE.value or ''}: name a stage of this configuration, which {known}")
    return config.of_stage(names.index(_STAGE.value))


def _show(plan: Plan) -> None:
    from mmx.plan.page import page

    if _PICTURES.value:
        from mmx.plan.pictures import draw

        for path in draw(plan, Path(_PICTURES.value)):
            _note(f"wrote {path}")
    print(json.dumps(plan.to_dict(), indent=2) if _OUTPUT.value == "json" else page(plan))


def _search(config: Run, machine: Machine) -> None:
    from mmx.plan.search import lines, search

    found, lost = search(config, machine, best=_BEST.value, compile_best=_COMPILE_BEST.value, say=_note)
    if _OUTPUT.value == "json":
        best = [{"name": c.name, "loses": c.reason, **c.plan.to_dict()} for c in found]
        print(json.dumps({"best": best, "others": lost}, indent=2))
    else:
        print("\n".join(lines(found, lost)))


def _compare(config: Run) -> None:
    from mmx.plan.measured import compare

    comparison = compare(config, _note)
    if _OUTPUT.value == "json":
        print(json.dumps(vars(comparison) | {"error": comparison.error}, indent=2))
    else:
        print("\n".join(comparison.lines()))


def _stages() -> None:
    from mmx.plan.stages import compile_stages, table

    compile_stages(_STAGES.value, _note)
    print(table())


def _calibrate() -> None:
    from mmx.plan.calibrate import calibrate

    for line in calibrate(_note):
        print(line)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    program.main(run)
