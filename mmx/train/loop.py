"""A training run: restore or start, then stage by stage step, evaluate, report and save, until done or told to stop."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from mmx.config import ModelConfig, Run, save_json
from mmx.data.prepare import TOKENIZER
from mmx.parallel.processes import Board
from mmx.train.batch_size import BatchGrowth
from mmx.train.checkpoint import CHECKPOINTS, Checkpoints, Progress, load_initial
from mmx.train.console import Console
from mmx.train.evaluate import HeldoutLoss
from mmx.train.goodput import COMPILING, DATA, EVALUATING, PRODUCTIVE, SAVING, Goodput
from mmx.train.leg import WORTHWHILE_PASSES, Leg, require_data
from mmx.train.lock import locked_for_all
from mmx.train.metrics import MetricsWriter, read_metrics
from mmx.train.noise_scale import NoiseScale
from mmx.train.notice import heeding_notices
from mmx.train.optimizer import build_optimizer
from mmx.train.position_loss import PositionLosses
from mmx.train.recovery import Recovery
from mmx.train.reporter import Reporter
from mmx.train.schedule import learning_rate
from mmx.train.stages import before_next_step, last_step, run_is_over, stage_is_over
from mmx.train.step import StepMetrics, TrainState, abstract_state, init_state, start_state
from mmx.train.stop import StopRequest, stop_on_signals
from mmx.train.watchdog import Watchdog, write_to_stderr

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    stopped_by: signal.Signals | None
    heldout: HeldoutLoss | None  # after the last step, if the run was not stopped


def train(run: Run, workdir: Path, console: Console) -> Outcome:
    """Trains until the run is over, going on from the newest checkpoint in ``workdir``.

    The same run on the same mesh gives the same losses, bit for bit, however often it is interrupted.

    Raises:
      ConfigError: if the configuration, the data and what lies in the workdir do not fit together.
    """
    run.validate(jax.device_count())
    with stop_on_signals() as stop:
        return _Session(run, workdir, console, stop).run_to_end()


class _Session:
    """One process's part in a run, from start to end."""

    def __init__(self, run: Run, workdir: Path, console: Console, stop: StopRequest):
        self._run, self._workdir, self._console, self._stop = run, workdir, console, stop
        self._board = Board()
        self._is_writer = self._board.index == 0
        for stage in range(max(1, len(run.stages))):
            require_data(run.of_stage(stage))
        self._optimizer = build_optimizer(run.optimizer)
        self._positions = PositionLosses(run, workdir) if run.train.position_sequences else None
        self._noise = NoiseScale()
        self._leg: Leg | None = None
        self._recovery = Recovery(run.train.rollback_after)
        self._watchdog = Watchdog(run.train.hang_seconds, workdir, self._board.index, write_to_stderr)

    def run_to_end(self) -> Outcome:
        with (
            locked_for_all(self._workdir, self._board, self._console.say),
            self._watchdog.watching(),
            heeding_notices(write_to_stderr),
        ):
            return self._run_locked()

    def _run_locked(self) -> Outcome:
        run, console = self._run, self._console
        checkpoints = Checkpoints(self._workdir / CHECKPOINTS, run.checkpoint, console.say)
        try:
            state, progress = self._restore_or_start(checkpoints)
            if run_is_over(run, progress):
                capped = run.train.steps and progress.step >= run.train.steps
                longer = "train.steps" if capped else "the last stage's length" if run.stages else "train.tokens"
                console.say(f"already at step {progress.step}: raise {longer} to go on")
                return Outcome(progress.step, None, None)
            self._write_workdir()
            resumed_step = progress.step or None
            self._goodput = Goodput(read_metrics(self._workdir) if self._is_writer else (), resumed_step)
            metrics = MetricsWriter(self._workdir, resumed_step) if self._is_writer else None
            reporter = Reporter(console, metrics, self._observe, self._goodput)
            try:
                return self._train(state, progress, checkpoints, reporter)
            finally:
                if metrics is not None:
                    metrics.close()
        finally:
            checkpoints.close()

    def _restore_or_start(self, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
        run = self._run
        restored = checkpoints.restore(run.model, self._layout)
        if restored is not None:
            state, progress = restored
            self._noise = NoiseScale(**progress.noise)
            self._console.say(f"resuming from step {progress.step}")
            return state, progress
        progress = Progress(step=0, tokens=0, data={})
        with self._enter(progress).in_scope():
            if run.checkpoint.initial:
                self._console.say(f"starting from the parameters of {run.checkpoint.initial}")
                params = load_initial(Path(run.checkpoint.initial), run.model)
                return jax.jit(functools.partial(start_state, self._optimizer))(params), progress
            init = functools.partial(init_state, run.model, self._optimizer, run.train.seed)
            return jax.jit(init)(), progress

    def _layout(self, progress: Progress) -> TrainState:
        """How the state of a run that stands there lies, for its next step."""
        leg = self._enter(before_next_step(self._run, progress))
        with leg.in_scope():
            return abstract_state(leg.run.model, self._optimizer)

    def _enter(self, progress: Progress) -> Leg:
        """The leg of the next step."""
        train = self._run.of_stage(progress.stage).train
        self._growth = BatchGrowth(train.batch_marks, train.batch_smoothing, train.batch_patience, **progress.growth)
        doublings = self._growth.doublings(progress.step + 1)
        if self._leg is None or (self._leg.stage, self._leg.doublings) != (progress.stage, doublings):
            self._leg = Leg(self._run, progress.stage, doublings)
        return self._leg

    def _write_workdir(self) -> None:
        if self._is_writer:
            self._workdir.mkdir(parents=True, exist_ok=True)
            save_json(self._run, self._workdir / CONFIG)
            shutil.copyfile(Path(self._run.data.path) / TOKENIZER, self._workdir / TOKENIZER)

    def _train(self, state: TrainState, progress: Progress, checkpoints: Checkpoints, reporter: Reporter) -> Outcome:
        run, heldout = self._run, None
        reporter.started(progress)
        while not self._stop and not run_is_over(run, progress):
            progress = before_next_step(run, progress)
            leg = self._enter(progress)
            with leg.in_scope():
                state = leg.lay_out(state, self._optimizer)
                state, progress, heldout = self._train_leg(leg, state, progress, checkpoints, reporter)
        self._watchdog.alive("in the last save")
        if self._stop:
            if checkpoints.latest != progress.step:
                with self._leg.in_scope():
                    self._save(checkpoints, self._leg, state, progress, reporter)
            checkpoints.wait()
            self._console.say(f"stopped by {self._stop.signal.name}: saved step {progress.step}")
            return Outcome(progress.step, self._stop.signal, None)
        checkpoints.wait()
        return Outcome(progress.step, None, heldout)

    def _train_leg(
        self, leg: Leg, state: TrainState, progress: Progress, checkpoints: Checkpoints, reporter: Reporter
    ) -> tuple[TrainState, Progress, HeldoutLoss | None]:
        """Trains to the end of a leg, until told to stop, or until the run goes back to another leg.

        The last held-out loss is of the last step or None.
        """
        run, console, train = self._run, self._console, leg.run.train
        stage = run.stages[leg.stage].name if run.stages else ""
        end = last_step(run, progress)
        reporter.enter(leg, stage, end)
        if progress.step == 0:
            self._measure_positions(run.model, state, progress, "before", reporter)
            self._evaluate(leg, state, progress, reporter)
        if stage and progress.step == progress.step_before_stage:
            console.say(
                f"stage {stage}: {leg.run.data.sequence_length:,} tokens a row, RoPE base {leg.run.model.rope_base:g}"
            )
        if progress.step == progress.step_before_stage:
            for part, times in leg.often_repeated().items():
                console.say(
                    f"warning: {part} will be read {times:.1f} times, and what is read more than {WORTHWHILE_PASSES} "
                    "times is learned by heart: prepare more of it, lower its weight, or train for fewer tokens"
                )
        console.say("compiling the training step")
        started = time.monotonic()
        self._watchdog.rest()
        with self._goodput.spending(COMPILING):
            rows, step = leg.rows(progress), leg.compile(state, self._optimizer)
            self._board.gather("compiled")  # A process that waits for another's compiler in its first step is not hung.
        console.say(
            f"compiled in {time.monotonic() - started:.0f} s; training"
            + (f" with {leg.tokens_per_step:,} tokens a step" if train.batch_marks else "")
            + ("" if end is None else f" to step {end}")
        )
        reporter.resume_clock()
        self._goodput.spend(PRODUCTIVE)
        heldout, first_batch = None, leg.run.data.batch_size * leg.run.data.sequence_length
        while not self._stop.reached():
            self._watchdog.alive(f"in step {progress.step + 1}")
            waited = time.monotonic()
            with self._goodput.spending(DATA):
                row = next(rows)
            reporter.waited_for_data(time.monotonic() - waited)
            batch = leg.placement.to_devices(row)
            tokens = progress.tokens + leg.tokens_per_step
            rate = learning_rate(leg.run.optimizer, tokens - progress.tokens_before_stage, first_batch)
            state, step_metrics = step(state, batch, jnp.float32(rate))
            progress = dataclasses.replace(
                progress, step=progress.step + 1, tokens=tokens, data=leg.batches.get_state()
            )
            is_last = stage_is_over(run, progress) or run_is_over(run, progress)
            reporter.step_done(progress, rate, step_metrics, row, is_last=is_last)
            if self._recovery.is_due(step_metrics):
                state, progress = self._go_back(state, progress, checkpoints, reporter)
                if self._leg is leg:
                    continue
                return state, progress, None

            heldout = None
            if is_last or (train.eval_every and progress.step % train.eval_every == 0):
                self._watchdog.alive(f"evaluating step {progress.step}")
                heldout = self._evaluate(leg, state, progress, reporter)
                if is_last:
                    self._measure_positions(leg.run.model, state, progress, stage or "after", reporter)
            if is_last or (progress.step % run.checkpoint.every == 0 and self._recovery.may_save(step_metrics)):
                self._watchdog.alive(f"saving step {progress.step}")
                progress = self._save(checkpoints, leg, state, progress, reporter)
            if is_last or self._growth.doublings(progress.step + 1) != leg.doublings:
                break
        reporter.flush()
        return state, self._with_decisions(progress), heldout

    def _go_back(
        self, state: TrainState, progress: Progress, checkpoints: Checkpoints, reporter: Reporter
    ) -> tuple[TrainState, Progress]:
        """The state of the last checkpoint, on the leg that it is in, and the position in its stage's data as it is."""
        reporter.flush()
        checkpoints.wait()
        skipped = jax.device_get(state.skipped)
        jax.tree.map(lambda x: x.delete(), state)  # There may be no room for two.
        restored = checkpoints.restore(self._run.model, self._layout)
        self._recovery.went_back(None if restored is None else restored[1].step)
        state, there = restored
        reporter.went_back(there, progress)
        self._noise = NoiseScale(**there.noise)
        there = before_next_step(self._run, there)
        # Of an earlier stage, nothing behind the checkpoint was read.
        data = progress.data if there.stage == progress.stage else there.data
        there = dataclasses.replace(there, data=data, rollbacks=progress.rollbacks + 1)
        health = state.health._replace(bad_in_a_row=0 * state.health.bad_in_a_row)
        return state._replace(skipped=jax.device_put(skipped, state.skipped.sharding), health=health), there

    def _measure_positions(
        self, model: ModelConfig, state: TrainState, progress: Progress, label: str, reporter: Reporter
    ) -> None:
        if self._positions is not None:
            with reporter.paused(EVALUATING):
                self._positions.measure(model, state.params, label, progress.step)

    def _observe(self, progress: Progress, metrics: StepMetrics) -> dict[str, float]:
        """Lets the loss and the gradient's noise of a step count, unless the step did not."""
        more: dict[str, float] = {}
        good = int(metrics.bad_in_a_row) == 0
        if self._growth.marks:
            more["batch_tokens"] = self._leg.tokens_per_step
            if good:
                self._growth.observe(progress.step, float(metrics.loss))
        if metrics.noise is not None and good:
            square, variance = float(metrics.noise.square), float(metrics.noise.variance)
            self._noise.observe(square, variance)
            more |= {"gradient_square": square, "gradient_variance": variance}
            more |= {} if self._noise.tokens is None else {"noise_scale": self._noise.tokens}
        return more

    def _with_decisions(self, progress: Progress) -> Progress:
        return dataclasses.replace(progress, growth=self._growth.state(), noise=self._noise.state())

    def _save(
        self, checkpoints: Checkpoints, leg: Leg, state: TrainState, progress: Progress, reporter: Reporter
    ) -> Progress:
        with reporter.paused(SAVING):  # Which lets the last step count, too.
            progress = self._with_decisions(progress)
            checkpoints.save(leg.run.model, state, progress)
        self._goodput.saved()
        return progress

    def _evaluate(self, leg: Leg, state: TrainState, progress: Progress, reporter: Reporter) -> HeldoutLoss | None:
        if not leg.run.data.heldout_sequences:
            return None
        with reporter.paused(EVALUATING):
            loss = leg.heldout_loss(state)
        reporter.evaluated(progress, loss)
        return loss
