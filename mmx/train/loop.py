"""A training run: open the data, restore or start, then step, evaluate, report and save until done or told to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmx.config import ConfigError, Run, save_json
from mmx.data.loader import PreparedData
from mmx.data.prepare import TOKENIZER
from mmx.parallel import build_mesh
from mmx.parallel.compiler import compiler_options
from mmx.parallel.processes import Board
from mmx.parallel.sequence_layout import SequenceLayout
from mmx.train.checkpoint import CHECKPOINTS, Checkpoints, Progress, load_initial
from mmx.train.console import Console
from mmx.train.evaluate import HeldoutLoss, heldout_loss, heldout_sums
from mmx.train.goodput import COMPILING, DATA, EVALUATING, PRODUCTIVE, SAVING, Goodput
from mmx.train.lock import locked_for_all
from mmx.train.metrics import MetricsWriter, read_metrics
from mmx.train.notice import heeding_notices
from mmx.train.optimizer import build_optimizer
from mmx.train.placement import BatchPlacement
from mmx.train.recovery import Recovery
from mmx.train.reporter import Reporter
from mmx.train.schedule import learning_rate
from mmx.train.step import TrainState, abstract_state, init_state, start_state, train_step
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
    """Trains until ``run.train.steps`` steps are done in all, going on from the newest checkpoint in ``workdir``.

    The same run on the same mesh gives the same losses, bit for bit, however often it is interrupted.

    Raises:
      ConfigError: if the configuration, the data and what lies in the workdir do not fit together.
    """
    run.validate(jax.device_count())
    with stop_on_signals() as stop, _mesh_in_scope(run) as mesh:
        return _Session(run, workdir, console, mesh, stop).run_to_end()


@contextlib.contextmanager
def _mesh_in_scope(run: Run) -> Iterator[Mesh | None]:
    """The run's mesh. A single device has none: everything is then ordinary JAX."""
    if jax.device_count() == 1:
        yield None
        return
    mesh = build_mesh(run.mesh)
    with jax.set_mesh(mesh):
        yield mesh


class _Session:
    """One process's part in a run, from start to end."""

    def __init__(self, run: Run, workdir: Path, console: Console, mesh: Mesh | None, stop: StopRequest):
        self._run, self._workdir, self._console, self._stop = run, workdir, console, stop
        layout = SequenceLayout(run.model.sequence_layout)
        self._placement = BatchPlacement(mesh, layout, run.data.batch_size, run.data.sequence_length)
        self._board = Board()
        self._is_writer = self._board.index == 0
        self._data = PreparedData(run.data)
        needed = self._data.tokenizer.vocab_size
        if needed > run.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={run.model.vocab_size} does not fit the tokenizer of {self._data.folder}, which has "
                f"{needed} tokens: set it to at least {needed}"
            )
        self._batches = self._data.training_batches(run.train.seed, self._placement.share)
        self._optimizer = build_optimizer(run.optimizer)
        self._tokens_per_step = run.data.batch_size * run.data.sequence_length
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
            if progress.step >= run.train.steps:
                console.say(f"already at step {progress.step}: raise train.steps to go on")
                return Outcome(progress.step, None, None)
            self._write_workdir()
            resumed_step = progress.step or None
            goodput = Goodput(read_metrics(self._workdir) if self._is_writer else (), resumed_step)
            metrics = MetricsWriter(self._workdir, resumed_step) if self._is_writer else None
            reporter = Reporter(run, console, metrics, self._placement.share.count, goodput)
            try:
                return self._train(state, progress, checkpoints, reporter, goodput)
            finally:
                if metrics is not None:
                    metrics.close()
        finally:
            checkpoints.close()

    def _restore_or_start(self, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
        run = self._run
        restored = checkpoints.restore(run.model, abstract_state(run.model, self._optimizer))
        if restored is not None:
            state, progress = restored
            self._batches.set_state(progress.data)
            self._console.say(f"resuming from step {progress.step}")
            return state, progress
        progress = Progress(step=0, tokens=0, data=self._batches.get_state())
        if run.checkpoint.initial:
            self._console.say(f"starting from the parameters of {run.checkpoint.initial}")
            params = load_initial(Path(run.checkpoint.initial), run.model)
            return jax.jit(functools.partial(start_state, self._optimizer))(params), progress
        init = functools.partial(init_state, run.model, self._optimizer, run.train.seed)
        return jax.jit(init)(), progress

    def _write_workdir(self) -> None:
        if self._is_writer:
            self._workdir.mkdir(parents=True, exist_ok=True)
            save_json(self._run, self._workdir / CONFIG)
            shutil.copyfile(self._data.tokenizer_path, self._workdir / TOKENIZER)

    def _train(
        self, state: TrainState, progress: Progress, checkpoints: Checkpoints, reporter: Reporter, goodput: Goodput
    ) -> Outcome:
        run, console = self._run, self._console
        reporter.started(progress)
        if progress.step == 0:
            self._evaluate(state, progress, reporter)
        console.say("compiling the training step")
        started = time.monotonic()
        iterator = iter(self._batches)
        with goodput.spending(COMPILING):
            step = self._compile(state)
            self._board.gather("compiled")  # A process that waits for another's compiler in its first step is not hung.
        console.say(f"compiled in {time.monotonic() - started:.0f} s; training to step {run.train.steps}")
        reporter.resume_clock()
        goodput.spend(PRODUCTIVE)
        heldout = None
        while progress.step < run.train.steps and not self._stop.reached():
            self._watchdog.alive(f"in step {progress.step + 1}")
            waited = time.monotonic()
            with goodput.spending(DATA):
                row = next(iterator)
            reporter.waited_for_data(time.monotonic() - waited)
            batch = self._placement.to_devices(row)
            tokens = progress.tokens + self._tokens_per_step
            rate = learning_rate(run.optimizer, tokens, self._tokens_per_step)
            state, step_metrics = step(state, batch, jnp.float32(rate))
            progress = dataclasses.replace(
                progress, step=progress.step + 1, tokens=tokens, data=self._batches.get_state()
            )
            reporter.step_done(progress, rate, step_metrics, row)
            if self._recovery.is_due(step_metrics):
                state, progress = self._go_back(state, progress, checkpoints, reporter)
                continue

            is_last = progress.step == run.train.steps
            if is_last or (run.train.eval_every and progress.step % run.train.eval_every == 0):
                self._watchdog.alive(f"evaluating step {progress.step}")
                heldout = self._evaluate(state, progress, reporter)
            if is_last or (progress.step % run.checkpoint.every == 0 and self._recovery.may_save(step_metrics)):
                self._watchdog.alive(f"saving step {progress.step}")
                with reporter.paused(SAVING):
                    checkpoints.save(run.model, state, progress)
                goodput.saved()
        reporter.flush()
        self._watchdog.alive("in the last save")
        if self._stop:
            if checkpoints.latest != progress.step:
                checkpoints.save(run.model, state, progress)
            checkpoints.wait()
            console.say(f"stopped by {self._stop.signal.name}: saved step {progress.step}")
            return Outcome(progress.step, self._stop.signal, None)
        checkpoints.wait()
        return Outcome(progress.step, None, heldout)

    def _go_back(
        self, state: TrainState, progress: Progress, checkpoints: Checkpoints, reporter: Reporter
    ) -> tuple[TrainState, Progress]:
        """The state of the last checkpoint, and the position in the data as it is."""
        reporter.flush()
        checkpoints.wait()
        skipped = state.skipped.copy()
        jax.tree.map(lambda x: x.delete(), state)  # There may be no room for two.
        restored = checkpoints.restore(self._run.model, abstract_state(self._run.model, self._optimizer))
        self._recovery.went_back(None if restored is None else restored[1].step)
        state, there = restored
        reporter.went_back(there, progress)
        health = state.health._replace(bad_in_a_row=0 * state.health.bad_in_a_row)
        there = dataclasses.replace(there, data=progress.data, rollbacks=progress.rollbacks + 1)
        return state._replace(skipped=skipped, health=health), there

    def _compile(self, state: TrainState) -> Any:
        run = self._run
        step = functools.partial(
            train_step,
            run.model,
            self._optimizer,
            run.optimizer.clip_norm,
            run.train.micro_batches,
            spike_factor=run.train.spike_factor,
        )
        example = self._placement.empty()
        # The state's buffers are reused for the new state.
        lowered = jax.jit(step, donate_argnums=0).lower(state, example, jnp.float32(0))
        return lowered.compile(compiler_options=compiler_options(run.train.micro_batches))

    @functools.cached_property
    def _heldout_sums(self) -> Any:
        sizes = np.zeros(self._run.model.vocab_size, np.float32)
        token_bytes = self._data.tokenizer.token_bytes()
        sizes[: len(token_bytes)] = token_bytes
        sums = jax.jit(functools.partial(heldout_sums, self._run.model))
        return lambda params, batch: sums(params, batch, jnp.asarray(sizes))

    def _evaluate(self, state: TrainState, progress: Progress, reporter: Reporter) -> HeldoutLoss | None:
        if not self._run.data.heldout_sequences:
            return None
        with reporter.paused(EVALUATING):
            rows = self._data.heldout_batches(self._placement.share)
            batches = (self._placement.to_devices(row) for row in rows)
            loss = heldout_loss(lambda batch: self._heldout_sums(state.params, batch), batches)
        reporter.evaluated(progress, loss)
        return loss
