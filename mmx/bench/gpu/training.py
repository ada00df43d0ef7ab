"""Training steps of ``configs/text_1b.py``: speed, utilisation, memory, compile time, and where the time goes."""

from __future__ import annotations

import functools
import statistics
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from configs.text_1b import get_config
from mmx.bench.gpu.profile import slowest_operations
from mmx.config import count_parameters, training_flops
from mmx.train.loss import Batch
from mmx.train.optimizer import build_optimizer
from mmx.train.step import init_state, train_step
from mmx.train.throughput import utilisation

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink

STEPS = 5


def one_row_of_8k(sink: Sink) -> None:
    """A batch of one row of 8,192 tokens."""
    _measure(sink, rows=1, length=8192)


def four_rows_of_8k(sink: Sink) -> None:
    """A batch of four rows of 8,192 tokens: the recipe's micro-batch where a device has sixteen rows a step."""
    _measure(sink, rows=4, length=8192)


def one_row_of_64k(sink: Sink) -> None:
    """A batch of one row of 65,536 tokens."""
    _measure(sink, rows=1, length=65536)


def _measure(sink: Sink, rows: int, length: int) -> None:
    run = get_config()
    optimizer = build_optimizer(run.optimizer)
    counts = count_parameters(run.model)
    started = time.perf_counter()
    state = jax.block_until_ready(jax.jit(functools.partial(init_state, run.model, optimizer, 0))())
    sink.say(
        f"{counts.total / 1e9:.2f}B parameters, {counts.active / 1e9:.2f}B active; initialised in "
        f"{time.perf_counter() - started:.0f} s"
    )
    batch = _batch(run.model.vocab_size, rows, length)
    step = functools.partial(train_step, run.model, optimizer, run.optimizer.clip_norm, 1)
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, jnp.float32(0)).compile()
    compile_seconds = time.perf_counter() - started

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
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
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
    for name, spent, calls in slowest:
        sink.result(
            f"  {spent / total:5.1%} {spent * 1e3:9,.1f} ms {calls:6} calls  {name}",
            operation=name,
            share=spent / total,
            calls=calls,
        )


def _batch(vocabulary: int, rows: int, length: int) -> Batch:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    ones = np.ones((rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(*(jnp.asarray(x) for x in (tokens[:, :-1], tokens[:, 1:], ones, positions, ones.astype(np.float32))))
