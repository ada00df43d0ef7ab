"""Training steps of ``configs/text_1b.py``: speed, utilisation, memory, compile time, and where the time goes."""

from __future__ import annotations

import functools
import statistics
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.text_1b import get_config
from mmx.bench.gpu.clock import bytes_needed, compile_if_it_fits
from mmx.bench.gpu.profile import report_operations, slowest_operations
from mmx.config import Run, count_parameters, training_flops
from mmx.train.loss import Batch
from mmx.train.optimizer import build_optimizer
from mmx.train.step import TrainState, init_state, train_step
from mmx.train.throughput import utilisation

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink

# (rows, tokens in a row) of a batch. Four rows of 8K are what a micro-batch of 80 GB may hold.
BATCHES = ((1, 8192), (4, 8192), (1, 65536))
STEPS = 3


def measure(sink: Sink) -> None:
    """Every batch, one document a row."""
    run = get_config()
    optimizer = build_optimizer(run.optimizer)
    counts = count_parameters(run.model)
    started = time.perf_counter()
    state = jax.block_until_ready(jax.jit(functools.partial(init_state, run.model, optimizer, 0))())
    sink.say(
        f"{counts.total / 1e9:.2f}B parameters, {counts.active / 1e9:.2f}B active; initialised in "
        f"{time.perf_counter() - started:.0f} s"
    )
    for rows, length in BATCHES:
        state = _measure(sink, run, optimizer, state, rows, length)


def _measure(
    sink: Sink, run: Run, optimizer: optax.GradientTransformation, state: TrainState, rows: int, length: int
) -> TrainState:
    batch = _batch(run.model.vocab_size, rows, length)
    step = functools.partial(train_step, run.model, optimizer, run.optimizer.clip_norm, 1)
    try:
        compiled, compile_seconds = compile_if_it_fits(step, state, batch, jnp.float32(0), donate_argnums=0)
    except MemoryError as error:
        sink.result(f"{rows} x {length:,} tokens: {error}", rows=rows, length=length, failed=str(error))
        return state

    times = []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, batch, jnp.float32(1e-4)))
        times.append(time.perf_counter() - started)
    if not np.isfinite(metrics.loss):
        raise RuntimeError(f"the loss is {metrics.loss}")
    seconds = statistics.median(times[1:])
    device = jax.devices()[0]
    mfu = utilisation(run.model, [length] * rows, seconds, device.device_kind, 1)
    peak = bytes_needed(compiled)
    sink.result(
        f"{rows} x {length:,} tokens: {rows * length / seconds:,.0f} tokens/s, "
        f"{training_flops(run.model, [length] * rows) / seconds / 1e12:.0f} model TFLOP/s"
        + ("" if mfu is None else f", MFU {mfu:.1%}")
        + f", step {seconds * 1e3:,.0f} ms, peak memory {peak / 2**30:.1f} GiB, compiled in {compile_seconds:.0f} s",
        rows=rows,
        length=length,
        seconds=seconds,
        mfu=mfu,
        peak_bytes=peak,
        compile_seconds=compile_seconds,
        loss=float(metrics.loss),
    )

    def once() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, batch, jnp.float32(1e-4)))

    slowest, total = slowest_operations(once)
    sink.say(f"where the device's {total * 1e3:,.0f} ms go:")
    report_operations(sink, slowest, total)
    return state


def _batch(vocabulary: int, rows: int, length: int) -> Batch:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    ones = np.ones((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(*(jnp.asarray(x) for x in (tokens[:, :-1], tokens[:, 1:], ones, positions, ones.astype(np.float32))))
