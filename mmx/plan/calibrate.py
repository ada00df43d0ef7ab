"""Renews the table of ``calibration``: predicts the published steps."""

from __future__ import annotations

from collections.abc import Callable

from mmx.plan import calibration
from mmx.plan.machine import parse_machine
from mmx.plan.report import compiled_plan
from pallas_kernels.aot.compile import compiler_version


def calibrate(say: Callable[[str], None]) -> list[str]:
    """Compiles and predicts each step, writes the table and returns a line for each.

    Raises:
      ConfigError: if the compiler is missing.
    """
    steps = []
    for step in calibration.published():
        say(f"{step.name} on {step.topology}")
        plan = compiled_plan(step.run, parse_machine(step.topology), say)
        steps.append(
            {
                "name": step.name,
                "topology": step.topology,
                "published_mfu": step.mfu,
                "predicted_mfu": round(plan.predicted_mfu, 4),
                "ratio": round(step.mfu / plan.predicted_mfu, 3),
                "memory_gib": round(plan.used / 2**30, 1),
            }
        )
    calibration.save(steps, compiler_version())
    return [
        f"{s['name']} on {s['topology']}: predicted MFU {s['predicted_mfu']:.1%}, published {s['published_mfu']:.1%}, "
        f"ratio {s['ratio']:.2f}"
        for s in steps
    ]
