"""What a run says while it trains: rows of metrics.jsonl and TensorBoard, and lines on the console."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from mmx.data.packing import Row
from mmx.train.checkpoint import Progress
from mmx.train.console import Console
from mmx.train.evaluate import HeldoutLoss
from mmx.train.goodput import Goodput
from mmx.train.leg import Leg
from mmx.train.metrics import MetricsWriter
from mmx.train.step import StepMetrics
from mmx.train.throughput import document_lengths, utilisation


class _Pending(NamedTuple):
    """A step that has been started."""

    progress: Progress
    rate: float
    metrics: StepMetrics
    row: Row
    due: bool  # for a metrics row


class Reporter:
    """Turns what the loop sees into metrics rows and progress lines, and hands it on to what decides by it.

    The metrics of a step are fetched when the next step has been started, so that the devices never wait for it.
    """

    def __init__(
        self,
        console: Console,
        metrics: MetricsWriter | None,
        observe: Callable[[Progress, StepMetrics], dict[str, float]],
        goodput: Goodput,
    ):
        """``observe`` receives a step's metrics, on the host, and returns more for its row.

        It sees every step of a run whose batch grows or whose gradient noise is known, the logged ones of any other.
        """
        self._console, self._metrics, self._observe, self._goodput = console, metrics, observe, goodput
        self._pending: _Pending | None = None
        self.resume_clock()

    def enter(self, leg: Leg, stage: str, end: int | None) -> None:
        """The steps from here on are of this leg; ``stage`` is its name or empty, ``end`` its last step if known."""
        self.flush()
        self._leg, self._stage, self._end = leg, stage, end
        self.resume_clock()

    def resume_clock(self) -> None:
        """Starts the time over which throughput is measured."""
        self._since, self._steps, self._data_seconds = time.monotonic(), 0, 0.0

    @contextlib.contextmanager
    def paused(self, way: str) -> Iterator[None]:
        """Keeps the time inside out of the throughput; ``way`` is how it is spent, see ``mmx.train.goodput``."""
        self.flush()
        started = time.monotonic()
        with self._goodput.spending(way):
            yield
        self._since += time.monotonic() - started

    def waited_for_data(self, seconds: float) -> None:
        """Adds to the share of time spent waiting for the next batch."""
        self._data_seconds += seconds

    def started(self, progress: Progress) -> None:
        """Reports a start of the run, so that the time lost until then is on disk."""
        self._write({"step": progress.step, "tokens": progress.tokens, "event": "started"})

    def went_back(self, there: Progress, before: Progress) -> None:
        """Reports that the steps after a checkpoint are forgotten, and their data with them."""
        self._console.say(
            f"too many skipped steps in a row: going back from step {before.step} to {there.step}; "
            "the data in between is skipped"
        )
        self._pending = None
        self._goodput.went_back()
        if self._metrics is not None:
            self._metrics.go_back(there.step)
        self._write(
            {"step": there.step, "tokens": there.tokens, "event": "went back", "from_step": before.step}
            | {"rollbacks": before.rollbacks + 1}
        )
        self.resume_clock()

    def step_done(self, progress: Progress, rate: float, step_metrics: StepMetrics, row: Row, *, is_last: bool) -> None:
        """Takes in the step before, now that this one has been started."""
        self.flush()
        self._steps += 1
        due = is_last or progress.step == 1 or progress.step % self._leg.run.train.log_every == 0
        decides = step_metrics.noise is not None or bool(self._leg.run.train.batch_marks)
        if due or decides:
            self._pending = _Pending(progress, rate, step_metrics, row, due)

    def evaluated(self, progress: Progress, loss: HeldoutLoss) -> None:
        """Reports a held-out evaluation."""
        held_out = {"heldout_loss": loss.nats_per_token, "heldout_bits_per_byte": loss.bits_per_byte}
        self._write(self._place(progress) | held_out)
        self._console.say(
            f"step {progress.step}: held out {loss.nats_per_token:.4f} nats/token, {loss.bits_per_byte:.4f} bits/byte"
        )

    def flush(self) -> None:
        """Takes in the step that waits, once it is done."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        values = jax.device_get(pending.metrics)  # Returns when the step is done.
        more = self._observe(pending.progress, values)
        if pending.due:
            self._report(pending, values, more)

    def _report(self, pending: _Pending, values: StepMetrics, more: dict[str, float]) -> None:
        progress, leg = pending.progress, self._leg
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed = self._steps * leg.tokens_per_step / seconds
        load_LE = values.stats.load.share_E / leg.run.model.experts_per_token
        line = self._place(progress) | {
            "loss": float(values.loss),
            "grad_norm": float(values.grad_norm),
            "learning_rate": pending.rate,
            "tokens_per_second": speed,
            "data_wait": self._data_seconds / seconds,
            "router_load_max": float(load_LE.max() * load_LE.shape[1]),
            "drop_rate": float(values.stats.dropped.mean()),
            "drop_rate_by_layer": np.round(values.stats.dropped.astype(float), 6).tolist(),
            "skipped_steps": int(values.skipped),
            "rollbacks": progress.rollbacks,
            **more,
        }
        mfu = self._utilisation(pending.row, seconds / self._steps)
        if mfu is not None:
            line["mfu"] = mfu
        self._write(line | {"router_load": np.round(load_LE.astype(float), 4).tolist()})
        self._console.progress(
            (f"{self._stage}: " if self._stage else "")
            + f"step {progress.step}{'' if self._end is None else f'/{self._end}'}  loss {line['loss']:.4f}  "
            f"grad norm {line['grad_norm']:.3f}  rate {pending.rate:.2e}  "
            f"{speed:,.0f} tokens/s  data wait {line['data_wait']:.0%}"
            + (f"  MFU {mfu:.1%}" if mfu is not None else "")
            + (f"  skipped {line['skipped_steps']}" if line["skipped_steps"] else "")
        )
        self.resume_clock()

    def _utilisation(self, row: Row, seconds: float) -> float | None:
        # The documents that this process reads stand for those of the others.
        lengths = document_lengths(row["segment_ids"]) * self._leg.placement.share.count
        return utilisation(self._leg.run.model, lengths, seconds, jax.devices()[0].device_kind, jax.device_count())

    def _place(self, progress: Progress) -> dict[str, Any]:
        stage = {"stage": self._stage} if self._stage else {}
        return {"step": progress.step, "tokens": progress.tokens, **stage}

    def _write(self, row: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(row | self._goodput.row())
