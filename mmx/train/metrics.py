"""What a run leaves for others to read: metrics.jsonl and TensorBoard events with the same names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl in order; a last line that was cut off is left out."""
    path = workdir / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Appends rows, one JSON object a line, each on disk before the next step's is written."""

    def __init__(self, workdir: Path, resumed_step: int | None):
        """Rows after ``resumed_step`` are dropped: those steps are taken again. None: the run starts from nothing."""
        self._workdir = workdir
        self._open(resumed_step)

    def go_back(self, step: int) -> None:
        """Drops the rows after a step."""
        self.close()
        self._open(step)

    def _open(self, last_step: int | None) -> None:
        path = self._workdir / METRICS
        first_step = 0 if last_step is None else last_step + 1
        kept = [row for row in read_metrics(self._workdir) if row["step"] < first_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=first_step, flush_secs=10)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row, which has a ``step``; its scalars also go to TensorBoard."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()
