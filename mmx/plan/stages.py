"""The report's stages, each with its plan: compiled once, kept beside the plans, printed as README's table.

``configs/plans/compiled.json`` holds what the compiler said of each, with the configuration that it said it of: a
changed configuration is told from a renewed plan.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import configs.plans
from mmx.config import ConfigError, Run, nearest, to_dict
from mmx.plan.machine import parse_machine
from mmx.plan.report import compiled_plan

STAGES = ("pretrain_8k", "extend_128k", "extend_512k", "extend_1m", "sft_1m")
RECORD = Path(configs.plans.__file__).with_name("compiled.json")
_KEPT = (
    "compiler",
    "bytes_used",
    "share_free",
    "predicted_step_seconds",
    "predicted_mfu",
    "predicted_tokens_per_day",
    "predicted_stage_days",
    "predicted_stage_chip_hours",
)


def stage(name: str) -> tuple[str, Run]:
    """Topology and run of a stage."""
    module = importlib.import_module(f"configs.plans.{name}")
    return module.TOPOLOGY, module.get_config()


def compile_stages(names: Sequence[str], say: Callable[[str], None]) -> None:
    """Compiles stages, or "all", and renews their record; minutes each.

    Raises:
      ConfigError: for a name that is no stage's.
    """
    names = STAGES if "all" in names else names
    for name in names:
        if name not in STAGES:
            raise ConfigError(f"--stages: there is no stage {name!r}{nearest(name, STAGES)}")
    for name in names:
        say(name)
        topology, run = stage(name)
        plan = compiled_plan(run, parse_machine(topology), say).to_dict()
        rows = record() | {name: {key: plan[key] for key in _KEPT} | {"config": shape_of(name)}}
        RECORD.write_text(json.dumps({key: rows[key] for key in STAGES if key in rows}, indent=1) + "\n")


def record() -> dict[str, Any]:
    """What the compiler said, by stage."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def shape_of(name: str) -> dict[str, Any]:
    """What of a stage decides its program."""
    topology, run = stage(name)
    values = json.loads(json.dumps(to_dict(run)))
    data = {key: values["data"][key] for key in ("sequence_length", "batch_size")}
    model = values["model"] | {"layer_pattern": " ".join(f"{kind[0]}" for kind in values["model"]["layer_pattern"])}
    shape = {"data": data, "model": model, "mesh": values["mesh"], "micro_batches": run.train.micro_batches}
    return {"topology": topology, **shape}


def unchanged(name: str) -> bool:
    """Whether a stage is what its record was made of; fields that came later have their defaults in it."""

    def agrees(kept: Any, now: Any) -> bool:
        if isinstance(kept, dict):
            return all(key in now and agrees(value, now[key]) for key, value in kept.items())
        return kept == now

    return agrees(record()[name]["config"], shape_of(name))


def table() -> str:
    """The record as a Markdown table."""
    lines = [
        "| stage | tokens in a row | v5p chips | mesh | memory, free | predicted step | predicted MFU | chip-hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in record().items():
        topology, run = stage(name)
        mesh = " ".join(f"{axis}={size}" for axis, size in to_dict(run.mesh).items() if size != 1)
        lines.append(
            f"| `{name}` | {run.data.sequence_length:,} | {parse_machine(topology).chips:,} | {mesh} | "
            f"{row['bytes_used'] / 2**30:.1f} GiB, {row['share_free']:.0%} | {row['predicted_step_seconds']:.0f} s | "
            f"{row['predicted_mfu']:.1%} | {row['predicted_stage_chip_hours']:,.0f} |"
        )
    return "\n".join(lines)
