"""The critical batch size against the training loss, fitted as a power law over several runs (report Fig. 13).

The report's four marks lie, within 1%, on B = 2.10e9 L^-6.12 tokens; they hold for its tokenizer and data alone. Other
data need marks of their own, from small runs that accumulate over micro-batches and so know their gradients' noise.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from mmx.config import ConfigError, count_parameters, load_json
from mmx.train.loop import CONFIG
from mmx.train.metrics import METRICS, read_metrics

matplotlib.use("Agg")  # There may be no screen.
from matplotlib import pyplot as plt

PICTURE, RESULT = "critical_batch.png", "critical_batch.json"
# Training loss -> batch in tokens that the report goes to there (section 4.2).
REPORT_MARKS = {2.22: 16e6, 1.98: 32e6, 1.77: 64e6, 1.58: 128e6}
_POINTS = 10  # of a run
_FEWEST_STEPS = 30  # of a point


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """tokens = scale * loss ** exponent."""

    scale: float
    exponent: float

    def tokens(self, loss: float | np.ndarray) -> Any:
        """Critical batch size at a loss."""
        return self.scale * loss**self.exponent

    def loss(self, tokens: float) -> float:
        """Loss at which the critical batch size is ``tokens``."""
        return (tokens / self.scale) ** (1 / self.exponent)


@dataclasses.dataclass(frozen=True)
class RunPoints:
    """What one run measured; losses in nats a token, sizes in tokens."""

    name: str
    parameters: int
    batch_tokens: int
    losses: list[float]
    sizes: list[float]
    steps: list[int]  # that each point is a mean of


def fit_power_law(losses: Sequence[float], sizes: Sequence[float], steps: Sequence[float] | None = None) -> PowerLaw:
    """Least squares in logarithms, points weighed by their steps if given.

    Raises:
      ConfigError: if all losses are the same, or there are fewer than two.
    """
    if len(set(losses)) < 2:
        raise ConfigError("a power law needs points at two losses at least: log more steps, or give more runs")
    exponent, intercept = np.polyfit(np.log(losses), np.log(sizes), 1, w=None if steps is None else np.sqrt(steps))
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def run_points(workdir: Path) -> RunPoints:
    """Loss and gradient noise scale over stretches of a run whose lengths double, as the loss falls ever more slowly.

    Raises:
      ConfigError: if the run did not log what it takes.
    """
    run = load_json(workdir / CONFIG)
    rows = [row for row in read_metrics(workdir) if "gradient_square" in row]
    # While the rate warms up the loss falls through what no later model has at that loss.
    first = run.of_stage(0)
    warmup = first.optimizer.schedule[0]
    skipped = warmup.tokens or warmup.steps * first.data.batch_size * first.data.sequence_length
    rows = [row for row in rows if row["tokens"] > skipped]
    if len(rows) < _FEWEST_STEPS:
        raise ConfigError(
            f"{workdir / METRICS} has {len(rows)} steps with the gradient's noise after the warm-up and needs "
            f"{_FEWEST_STEPS}: train longer, with --config.train.micro_batches=4 or more and --config.train.log_every=1"
        )
    edges = np.geomspace(_FEWEST_STEPS, len(rows), min(_POINTS, len(rows) // _FEWEST_STEPS)).astype(int)
    losses, sizes, steps = [], [], []
    for start, stop in itertools.pairwise((0, *np.unique(edges))):
        loss, square, variance = (
            float(np.mean([row[name] for row in rows[start:stop]]))
            for name in ("loss", "gradient_square", "gradient_variance")
        )
        # A stretch whose gradient drowned in noise says only that the scale is large.
        if square > 0 and variance > 0:
            losses.append(loss)
            sizes.append(variance / square)
            steps.append(int(stop - start))
    batch = first.data.batch_size * first.data.sequence_length
    return RunPoints(workdir.name, count_parameters(run.model).active, batch, losses, sizes, steps)


def write_critical_batch(workdirs: Sequence[Path], output: Path) -> dict[str, Any]:
    """Fits all runs together; writes the picture and the numbers, and returns these."""
    runs = [run_points(workdir) for workdir in workdirs]
    law = fit_power_law(*([x for run in runs for x in getattr(run, name)] for name in ("losses", "sizes", "steps")))
    residuals = [
        math.log(size / law.tokens(loss)) for run in runs for loss, size in zip(run.losses, run.sizes, strict=True)
    ]
    batch = min(run.batch_tokens for run in runs)
    result = {
        "scale": law.scale,
        "exponent": law.exponent,
        "typical_factor_off": math.exp(float(np.std(residuals))),
        "doubling_marks": {str(batch * 2**n): round(law.loss(batch * 2**n), 4) for n in range(1, 4)},
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    _draw(runs, law, output / PICTURE)
    return result


def _draw(runs: Sequence[RunPoints], law: PowerLaw, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8.5, 6), layout="constrained")
    for run in runs:
        label = f"{run.name}, {run.parameters / 1e6:,.1f}M active parameters"
        axes.loglog(run.losses, run.sizes, "o", ms=5, alpha=0.8, label=label)
    marks = fit_power_law(list(REPORT_MARKS), list(REPORT_MARKS.values()))
    own = [loss for run in runs for loss in run.losses]
    span = np.geomspace(min(own) / 1.05, max(own) * 1.05)
    axes.loglog(span, law.tokens(span), color="#1f5fa8", lw=1.6, label=f"our fit: {_formula(law)}")
    report = np.geomspace(min(REPORT_MARKS) / 1.05, max(own) * 1.05)
    axes.loglog(report, marks.tokens(report), "--", color="#6b7280", lw=1.2, label=f"through them: {_formula(marks)}")
    axes.loglog(list(REPORT_MARKS), list(REPORT_MARKS.values()), "*", color="#d1495b", ms=13, label="report's marks")
    axes.set(xlabel="training loss, nats a token", ylabel="critical batch size, tokens", title="Critical batch size")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _formula(law: PowerLaw) -> str:
    return f"{law.scale:.3g} L^{law.exponent:.2f}"
