"""Several GPUs: the same losses on every mesh as on one GPU, and the speed of training steps.

Shapes: B rows and S tokens of the whole batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from configs.text_1b import get_config
from mmx.bench.gpu.clock import bytes_needed, compile_if_it_fits
from mmx.bench.gpu.correctness import MODEL
from mmx.bench.gpu.profile import report_operations, slowest_operations
from mmx.config import MESH_AXES, ConfigError, DataConfig, MeshConfig, Run, TrainConfig
from mmx.data.packing import ROW_DTYPES, Row
from mmx.parallel import build_mesh
from mmx.parallel.sequence_layout import SequenceLayout
from mmx.train.loss import Batch
from mmx.train.optimizer import build_optimizer
from mmx.train.placement import BatchPlacement
from mmx.train.step import init_state, train_step
from mmx.train.throughput import utilisation

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink

# Axes that are compared, each over all GPUs.
AXES = tuple(axis for axis in MESH_AXES if axis != "replica")
# Rounding differs between meshes, and AdamW's first steps are large: losses agree to this after STEPS of them.
STEPS, LARGEST_DIFFERENCE = 5, 1e-4
SMALL = Run(
    model=dataclasses.replace(MODEL, num_experts=8, expert_hidden_size=384),
    data=DataConfig(sequence_length=512, batch_size=8),
    train=TrainConfig(steps=STEPS),
)
# Axis, rows for each GPU, tokens in a row: four rows of 8K are what one GPU takes, a row of 64K is split.
TIMED = ((None, 4.0, 8192), ("fsdp", 4.0, 8192), ("expert", 4.0, 8192), ("tensor", 2.0, 8192), ("context", 0.5, 65536))
TIMED_STEPS, PROFILED = 3, 6


def measure(sink: Sink) -> None:
    """Losses of a small model on every mesh, then steps of ``configs/text_1b.py``."""
    devices = len(jax.devices())
    if devices == 1:
        sink.say("one GPU: there is no mesh to compare with it")
        return
    compare(sink, devices)
    for axis, rows, length in TIMED:
        _time(sink, axis, max(1, round(rows * (devices if axis else 1))), length)


def compare(sink: Sink, devices: int) -> None:
    """Losses and gradient norms of a few steps, every axis alone against one GPU, in fp32."""
    expected = _train_small(None)
    for axis in AXES:
        mesh = MeshConfig(**{axis: devices})
        try:
            dataclasses.replace(SMALL, mesh=mesh).validate(devices)
        except ConfigError as error:
            sink.say(f"{axis}={devices} not compared: {error}")
            continue
        difference = float(np.max(np.abs(_train_small(mesh) - expected) / expected))
        verdict = "agree" if difference <= LARGEST_DIFFERENCE else "DIFFER"
        sink.result(
            f"{axis}={devices}: {verdict}; losses and gradient norms of {STEPS} steps within {difference:.1e} of one "
            "GPU's",
            axis=axis,
            verdict=verdict,
            difference=difference,
        )


def _train_small(mesh: MeshConfig | None) -> np.ndarray:
    """Loss and gradient norm of every step, [STEPS, 2]."""
    seen = []
    with _scope(mesh), jax.default_matmul_precision("highest"):
        batch = _batch(SMALL, np.random.default_rng(0).integers(1, 4, SMALL.data.batch_size))
        state, step = _start(SMALL)
        step = jax.jit(step)
        for _ in range(STEPS):
            state, metrics = step(state, batch, jnp.float32(1e-3))
            seen.append((float(metrics.loss), float(metrics.grad_norm)))
    return np.asarray(seen)


def _time(sink: Sink, axis: str | None, rows: int, length: int) -> None:
    run = get_config()
    run.data.batch_size, run.data.sequence_length, run.train.micro_batches = rows, length, 1
    devices = len(jax.devices()) if axis else 1
    name = f"{axis}={devices}" if axis else "one GPU"
    line = f"{name}, {rows} x {length:,} tokens"
    with _scope(MeshConfig(**{axis: devices}) if axis else None):
        batch = _batch(run, np.ones(rows, int))
        state, step = _start(run)
        try:
            compiled, compile_seconds = compile_if_it_fits(step, state, batch, jnp.float32(0), donate_argnums=0)
        except MemoryError as error:
            sink.result(f"{line}: {error}", mesh=name, rows=rows, length=length, failed=str(error))
            return
        times = []
        for _ in range(1 + TIMED_STEPS):
            started = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, batch, jnp.float32(1e-4)))
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times[1:])
        mfu = utilisation(run.model, [length] * rows, seconds, jax.devices()[0].device_kind, devices)
        peak = bytes_needed(compiled)
        sink.result(
            f"{line}: {rows * length / seconds:,.0f} tokens/s"
            + ("" if mfu is None else f", MFU {mfu:.1%}")
            + f", step {seconds * 1e3:,.0f} ms, {peak / 2**30:.1f} GiB a GPU, compiled in {compile_seconds:.0f} s",
            mesh=name,
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

        slowest, total = slowest_operations(once, PROFILED)
        report_operations(sink, slowest, total)


@contextlib.contextmanager
def _scope(mesh: MeshConfig | None):
    with jax.set_mesh(build_mesh(mesh)) if mesh else contextlib.nullcontext():
        yield


def _start(run: Run):
    """A fresh state and the step that trains it, on the mesh in scope."""
    optimizer = build_optimizer(run.optimizer)
    state = jax.block_until_ready(jax.jit(functools.partial(init_state, run.model, optimizer, 0))())
    return state, functools.partial(train_step, run.model, optimizer, run.optimizer.clip_norm, 1)


def _batch(run: Run, documents_B: np.ndarray) -> Batch:
    """Random rows, each cut into a number of equal documents, on the mesh in scope."""
    rows, length = run.data.batch_size, run.data.sequence_length
    tokens = np.random.default_rng(1).integers(0, run.model.vocab_size, (rows, length + 1))
    place, size = np.arange(length), -(-length // documents_B[:, None])
    row = Row(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=1 + place // size,
        positions=place % size,
        weights=np.ones((rows, length)),
    )
    mesh = jax.sharding.get_mesh()
    placement = BatchPlacement(None if mesh.empty else mesh, SequenceLayout(run.model.sequence_layout), rows, length)
    return placement.to_devices({name: row[name].astype(dtype) for name, dtype in ROW_DTYPES.items()})
