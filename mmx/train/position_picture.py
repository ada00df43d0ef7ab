"""A picture of the held-out loss by position, before and after a longer context was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # There may be no screen.
from matplotlib import pyplot as plt

PICTURE = "position_loss.png"
_FEWEST_TOKENS = 50  # Fewer say nothing about a range.


def draw_position_losses(saved: dict[str, Any], trained_length: int, title: str, path: Path) -> None:
    """Draws what ``mmx.train.position_loss`` wrote: a line a measurement, a point a range of positions.

    Args:
      saved: the measurements.
      trained_length: tokens of a row in the first stage, marked with a line.
      title: of the picture.
      path: of the PNG.
    """
    ends, counts = saved["position_below"], saved["target_tokens"]
    figure, axes = plt.subplots(figsize=(8.5, 5.5), layout="constrained")
    measurements = saved["measurements"]
    for index, entry in enumerate(measurements):
        # From grey before to full colour at the end: the order of the stages is the order of the lines.
        color = plt.cm.viridis(0.9 - 0.8 * index / max(1, len(measurements) - 1)) if index else "#6b7280"
        points = [(end, loss) for end, loss, n in zip(ends, entry["loss"], counts, strict=True) if n >= _FEWEST_TOKENS]
        dashes = "-" if index else "--"
        label = f"{entry['label']} (step {entry['step']:,}, RoPE base {entry['rope_base']:,.0f})"
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.5, color=color, ls=dashes, label=label)
    axes.axvline(trained_length, color="#6b7280", lw=0.8, ls=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(
        title=f"{title}: held-out loss by position",
        xlabel="position in the document, up to (dotted: rows of the first stage)",
        ylabel="nats a token",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
