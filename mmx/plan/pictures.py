"""A plan in pictures: memory of a device, a step's time, and the latency of prefill against the context's length."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from mmx.config import forward_flops
from mmx.plan.memory import GiB, Memory
from mmx.plan.report import Plan

matplotlib.use("Agg")  # There may be no screen.
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_COLOURS = ("#1f5fa8", "#5b8fc9", "#a9c4e4", "#d1495b", "#e8949f", "#c9a227", "#6b7280", "#2a9d8f")
# Devices that serve one prompt in the picture of prefill: the report's Fig. 2 has eight.
_PREFILL_DEVICES = 8
_LENGTHS = [2**13 * n for n in range(1, 129)]


def draw(plan: Plan, folder: Path) -> list[Path]:
    """Writes memory.png, step.png and prefill.png into ``folder`` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, panel in (("memory", _memory), ("step", _step), ("prefill", _prefill)):
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
        panel(axes, plan)
        axes.spines[["top", "right"]].set_visible(False)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def _memory(axes: Axes, plan: Plan) -> None:
    bars: dict[str, Memory] = {"counted": plan.memory_counted}
    if plan.memory:
        bars = {"compiled": plan.memory} | bars
    names = [name for name in vars(plan.memory_counted) if name != "host"]
    left = [0.0] * len(bars)
    for name, colour in zip(names, _COLOURS, strict=True):
        sizes = [getattr(memory, name) / GiB for memory in bars.values()]
        axes.barh(list(bars), sizes, left=left, color=colour, label=name.replace("_", " "))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.axvline(plan.memory_available / GiB, color="black", lw=1.2)
    axes.text(plan.memory_available / GiB, 1.02, "device", transform=axes.get_xaxis_transform(), ha="center")
    axes.set(title=f"Memory of a device, {plan.machine.name}", xlabel="GiB")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=8)


def _step(axes: Axes, plan: Plan) -> None:
    parts = plan.parts or plan.counted
    names = list(parts)[::-1]
    axes.barh(names, [parts[n].compute for n in names], color=_COLOURS[0], label="computing")
    waiting = [parts[n].waiting for n in names]
    axes.barh(names, waiting, left=[parts[n].compute for n in names], color=_COLOURS[3], label="waiting for links")
    axes.plot([parts[n].matrix_units for n in names], names, "k|", ms=12, label="its FLOPs at the peak")
    source = "predicted from the schedule" if plan.parts else "counted, not compiled"
    axes.set(title=f"A step of {plan.step_seconds:.1f} s, {source}", xlabel="seconds")
    axes.legend(frameon=False)


def _prefill(axes: Axes, plan: Plan) -> None:
    model, part = plan.run.model, plan.machine.part
    counts = [forward_flops(model, [n]) for n in _LENGTHS]
    seconds = lambda flops: flops / (_PREFILL_DEVICES * part.flops)  # noqa: E731
    linear = [seconds(c.total - c.softmax_scores - c.head) for c in counts]
    quadratic = [seconds(c.softmax_scores) for c in counts]
    thousands = [n / 1024 for n in _LENGTHS]
    axes.stackplot(
        thousands,
        linear,
        quadratic,
        colors=_COLOURS[1:4:2],
        labels=["linear: weights and lightning attention", "quadratic: softmax layers"],
    )
    axes.set(
        title=f"Prefill of one prompt on {_PREFILL_DEVICES} {part.name}: FLOPs at the peak, not a measurement",
        xlabel="thousands of tokens (1024)",
        ylabel="seconds",
    )
    share = quadratic[-1] / (linear[-1] + quadratic[-1])
    axes.annotate(f"softmax {share:.0%}", (thousands[-1], linear[-1] + quadratic[-1] / 2), ha="right", fontsize=9)
    axes.legend(frameon=False, loc="upper left")
