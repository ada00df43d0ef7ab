"""How far a run is, read from its workdir: the last step and loss, and the newest checkpoint. Standard library only."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

# Bytes from the end of metrics.jsonl that surely hold a whole row.
TAIL = 1 << 16


@dataclasses.dataclass
class Progress:
    """What is known; None for what is not."""

    step: int | None = None
    loss: float | None = None
    steps: int | None = None  # of the whole run
    checkpoint: int | None = None  # step of the newest one
    checkpoint_age: float | None = None  # seconds

    def __str__(self) -> str:
        if self.step is None:
            parts = ["no step is logged yet"]
        else:
            parts = [f"step {self.step}" + (f" of {self.steps}" if self.steps else "")]
            parts += [] if self.loss is None else [f"loss {self.loss:.4f}"]
        if self.checkpoint is None:
            parts.append("no checkpoint yet")
        else:
            age = "" if self.checkpoint_age is None else f", {show_seconds(self.checkpoint_age)} old"
            parts.append(f"checkpoint of step {self.checkpoint}{age}")
        return ", ".join(parts)


def read_progress(workdir: Path) -> Progress:
    """Looks into a folder, whatever of it exists."""
    progress = Progress()
    metrics = workdir / "metrics.jsonl"
    if metrics.exists():
        with metrics.open("rb") as file:
            file.seek(max(metrics.stat().st_size - TAIL, 0))
            read_metrics_tail(file.read().decode(errors="replace"), progress)
    config = workdir / "config.json"
    if config.exists():
        read_config(config.read_text(), progress)
    steps = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    if steps:
        newest = max(steps, key=lambda path: int(path.name))
        progress.checkpoint = int(newest.name)
        progress.checkpoint_age = max(time.time() - newest.stat().st_mtime, 0.0)
    return progress


def read_metrics_tail(text: str, progress: Progress) -> None:
    """Takes step and loss from the last row that has both; rows that are cut off are skipped."""
    for line in reversed(text.splitlines()):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row and "loss" in row:
            progress.step, progress.loss = row["step"], row["loss"]
            return


def read_config(text: str, progress: Progress) -> None:
    """Takes the length of the run from its config.json."""
    try:
        progress.steps = json.loads(text)["train"]["steps"]
    except (json.JSONDecodeError, KeyError, TypeError):
        progress.steps = None


def read_checkpoints(listing: str, progress: Progress) -> None:
    """Takes the newest checkpoint from a listing of their folder in a bucket, which does not say how old it is."""
    names = [line.strip().rstrip("/").rpartition("/")[2] for line in listing.splitlines()]
    progress.checkpoint = max((int(name) for name in names if name.isdigit()), default=None)


def show_seconds(seconds: float) -> str:
    """A duration in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
