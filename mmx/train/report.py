"""A picture and a page of a run, from what it left in its workdir."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from mmx.config import ConfigError, Run, count_parameters, load_json
from mmx.train.goodput import describe
from mmx.train.loop import CONFIG
from mmx.train.metrics import METRICS, read_metrics
from mmx.train.position_loss import describe_position_losses, read_position_losses
from mmx.train.position_picture import PICTURE as POSITION_PICTURE
from mmx.train.position_picture import draw_position_losses

matplotlib.use("Agg")  # There may be no screen.
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_ALTERNATIVES = ("Loss, router load, optimization, balance and speed", "Loss by position")
PICTURE, PAGE = "report.png", "report.html"
_TRAINING, _HELDOUT, _GREY = "#1f5fa8", "#d1495b", "#6b7280"


class Report(NamedTuple):
    """What was written, and what it says in words."""

    pictures: list[Path]  # of the run, and of the loss by position if it was measured
    page: Path
    facts: dict[str, str]


def write_report(workdir: Path, output: Path) -> Report:
    """Writes the picture and the page.

    Raises:
      ConfigError: if the workdir holds no metrics yet.
    """
    run = load_json(workdir / CONFIG)
    rows = read_metrics(workdir)
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise ConfigError(f"{workdir / METRICS} has no training step yet: let the run log one first")
    heldout = [row for row in rows if "heldout_loss" in row]
    output.mkdir(parents=True, exist_ok=True)
    pictures, page = [output / PICTURE], output / PAGE
    _draw(run, steps, heldout, workdir.name, pictures[0])
    if positions := read_position_losses(workdir):
        pictures.append(output / POSITION_PICTURE)
        draw_position_losses(positions, run.of_stage(0).data.sequence_length, workdir.name, pictures[1])
    facts = _facts(run, steps, heldout)
    if positions:
        facts["Held-out by position"] = describe_position_losses(positions)
    page.write_text(_page(facts, workdir.name, pictures), encoding="utf-8")
    return Report(pictures, page, facts)


def _draw(run: Run, steps: list[dict[str, Any]], heldout: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    figure.suptitle(
        f"{title}: {count_parameters(run.model).total / 1e6:,.1f}M parameters, {_pattern(run)}", fontsize=13
    )
    _draw_loss(panels[0, 0], steps, heldout)
    _draw_load(panels[0, 1], run, steps[-1])
    _draw_optimization(panels[1, 0], steps)
    _draw_balance(panels[1, 1], steps)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_loss(axes: Axes, steps: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> None:
    axes.plot(_column(steps, "tokens"), _column(steps, "loss"), color=_TRAINING, lw=1.4, label="training batch")
    for index, rows in enumerate(_by_stage(heldout).values()):
        label = None if index else "held out"
        axes.plot(_column(rows, "tokens"), _column(rows, "heldout_loss"), "o-", color=_HELDOUT, ms=5, lw=1, label=label)
        for row, side in zip((rows[0], rows[-1]) if len(rows) > 1 else (), ("left", "right"), strict=False):
            bits = f"{row['heldout_bits_per_byte']:.2f} bits/byte"
            axes.annotate(
                bits, (row["tokens"], row["heldout_loss"]), (0, 9), textcoords="offset points", ha=side, color=_HELDOUT
            )
    stages = list(_by_stage(steps).values())
    for rows in stages[1:]:
        axes.axvline(rows[0]["tokens"], color=_GREY, lw=0.8, ls=":")
    axes.set(title="Loss", xlabel="tokens", ylabel="nats a token")
    axes.legend(frameon=False)
    _tidy(axes)


def _draw_load(axes: Axes, run: Run, last: dict[str, Any]) -> None:
    load_LE = np.asarray(last["router_load"]) * run.model.num_experts
    image = axes.imshow(load_LE, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    if load_LE.size <= 128:
        for (layer, expert), value in np.ndenumerate(load_LE):
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set(title=f"Router load at step {last['step']} (1 = even share)", xlabel="expert", ylabel="layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, extend="max")


def _draw_optimization(axes: Axes, steps: list[dict[str, Any]]) -> None:
    axes.plot(_column(steps, "tokens"), _column(steps, "grad_norm"), color=_TRAINING, lw=1.2)
    axes.set(title="Gradient norm (left) and learning rate (right)", xlabel="tokens", yscale="log")
    axes.set_ylabel("gradient norm", color=_TRAINING)
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(lambda value, _: f"{value:g}")
    _tidy(axes)
    right = axes.twinx()
    right.plot(_column(steps, "tokens"), _column(steps, "learning_rate"), color=_GREY, lw=1.2, ls="--")
    right.set_ylabel("learning rate", color=_GREY)
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)


def _draw_balance(axes: Axes, steps: list[dict[str, Any]]) -> None:
    axes.plot(_column(steps, "tokens"), _column(steps, "router_load_max"), color=_TRAINING, lw=1.2)
    axes.axhline(1, color=_GREY, lw=0.8, ls=":")
    axes.set(title="Busiest expert (left) and speed (right)", xlabel="tokens")
    axes.set_ylabel("load over even share", color=_TRAINING)
    axes.set_ylim(bottom=0)
    _tidy(axes)
    right = axes.twinx()
    right.plot(_column(steps, "tokens"), _column(steps, "tokens_per_second"), color=_GREY, lw=1.2, ls="--")
    right.set_ylabel("tokens a second", color=_GREY)
    right.set_ylim(bottom=0)
    right.spines["top"].set_visible(False)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top"]].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))


def _short(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows]


def _pattern(run: Run) -> str:
    kinds = run.model.layer_pattern
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) + " layers"


def _facts(run: Run, steps: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> dict[str, str]:
    last, counts = steps[-1], count_parameters(run.model)
    facts = {
        "Steps": f"{last['step']:,}{_goal(run, last)}",
        "Tokens": f"{last['tokens']:,}",
        "Parameters": f"{counts.total:,} ({counts.active:,} active a token, without embeddings)",
        "Layers": _pattern(run),
        "Training loss": f"{last['loss']:.4f} nats a token",
        "Median speed": f"{np.median(_column(steps, 'tokens_per_second')):,.0f} tokens a second",
        "Dropped assignments": f"{last['drop_rate']:.2%} in the last logged step",
        "Skipped steps": f"{last['skipped_steps']}"
        + (f", gone back {last['rollbacks']} times" if last.get("rollbacks") else ""),
        "Data": run.data.path,
    }
    if goodput := describe(last):
        facts["Goodput"] = goodput
    for stage, rows in _by_stage(heldout).items():
        first, final = rows[0], rows[-1]
        bits = f"{first['heldout_bits_per_byte']:.4f} at step {first['step']}"
        if final is not first:
            ratio = final["heldout_bits_per_byte"] / first["heldout_bits_per_byte"]
            bits += f", {final['heldout_bits_per_byte']:.4f} at step {final['step']} ({ratio:.0%})"
        facts[f"Bits a byte, {stage}" if stage else "Held-out bits a byte"] = bits
    return facts


def _by_stage(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each stage, in order. Held-out losses of two stages do not compare: their rows have different lengths."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        stages.setdefault(row.get("stage", ""), []).append(row)
    return stages


def _goal(run: Run, last: dict[str, Any]) -> str:
    if "stage" in last:
        names = [stage.name for stage in run.stages]
        place = names.index(last["stage"]) + 1 if last["stage"] in names else "?"
        return f", stage {last['stage']} ({place} of {len(names)})"
    return f" of {run.train.steps:,}" if run.train.steps else f" ({run.train.tokens:,} tokens to go to)"


def _page(facts: dict[str, str], title: str, pictures: list[Path]) -> str:
    table = "\n".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    images = "\n".join(
        f'<p><img alt="{alt}" src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"></p>'
        for alt, picture in zip(_ALTERNATIVES, pictures, strict=False)
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{html.escape(title)}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #111827; }}
  th {{ text-align: left; padding-right: 2rem; font-weight: 600; vertical-align: top; }}
  img {{ max-width: 100%; }}
</style>
<h1>{html.escape(title)}</h1>
<table>
{table}
</table>
{images}
</html>
"""
