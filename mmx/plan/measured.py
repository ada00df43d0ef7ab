"""The count on paper beside a measurement, on the device that is here: a training step of a small configuration.

The device's peak and memory bandwidth are measured in the same run, between the steps, so that a busy machine slows
both alike.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import Run, training_flops
from mmx.plan.analytic import count_step, roofline_seconds
from mmx.plan.machine import Machine
from mmx.train.loss import Batch
from mmx.train.optimizer import build_optimizer
from mmx.train.step import init_state, train_step
from pallas_kernels.aot.chips import Gpu

_PRODUCT, _COPY = 2048, 2**26


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A step's time."""

    flops: float  # FLOP/s of a large product in the model's dtype, measured
    bandwidth: float  # bytes/s of a large copy, read and written, measured
    predicted: float  # seconds, by the count
    measured: float  # seconds, median
    model_flops: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the measurement; negative where it promised too much."""
        return self.predicted / self.measured - 1

    def lines(self) -> list[str]:
        """As text."""
        mfu = self.model_flops / self.flops
        return [
            f"measured peak {self.flops / 1e9:,.1f} GFLOP/s, copies {self.bandwidth / 1e9:,.1f} GB/s",
            f"predicted step {self.predicted:.3f} s (MFU {mfu / self.predicted:.1%}), measured {self.measured:.3f} s "
            f"(MFU {mfu / self.measured:.1%}): error {self.error:+.0%}",
        ]


def compare(run: Run, say: Callable[[str], None], turns: int = 5) -> Comparison:
    """Measures steps of a run on one device of this machine, and counts them with the rates measured meanwhile."""
    run.validate(1)
    optimizer = build_optimizer(run.optimizer)
    state = jax.jit(functools.partial(init_state, run.model, optimizer, run.train.seed))()
    function = functools.partial(train_step, run.model, optimizer, run.optimizer.clip_norm, run.train.micro_batches)
    step = jax.jit(function, donate_argnums=0)
    batch = _batch(run)
    say("compiling and warming up")
    state, _ = jax.block_until_ready(step(state, batch, jnp.float32(1e-4)))
    product, copy = _rates(jnp.dtype(run.model.dtype))
    steps, flops, bandwidth = [], [], []
    for _ in range(turns):
        flops.append(product())
        bandwidth.append(copy())
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch, jnp.float32(1e-4)))
        steps.append(time.perf_counter() - started)
    rates = statistics.median(flops), statistics.median(bandwidth)
    here = Gpu(jax.default_backend(), jax.devices()[0].device_kind, *rates, float("inf"), 1, 1.0, 1.0)
    machine = Machine("here", here, 1, 1, (1,))
    predicted = roofline_seconds(count_step(run, machine), machine)
    lengths = [run.data.sequence_length] * run.data.batch_size
    return Comparison(*rates, predicted, statistics.median(steps), training_flops(run.model, lengths))


def _batch(run: Run) -> Batch:
    shape = run.data.batch_size, run.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    ones, positions = np.ones(shape, np.int32), np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, positions, np.ones(shape, np.float32))


def _rates(dtype: jnp.dtype) -> tuple[Callable[[], float], Callable[[], float]]:
    a = jnp.ones((_PRODUCT, _PRODUCT), dtype)
    held = [jnp.ones(_COPY, jnp.float32)]
    # In place: fresh pages would be measured instead of the memory.
    multiply, shift = jax.jit(lambda a: a @ a), jax.jit(lambda x: x + 1, donate_argnums=0)

    def product() -> float:
        started = time.perf_counter()
        jax.block_until_ready(multiply(a))
        return 2.0 * _PRODUCT**3 / (time.perf_counter() - started)

    def copy() -> float:
        started = time.perf_counter()
        held[0] = jax.block_until_ready(shift(held[0]))
        return 2.0 * held[0].nbytes / (time.perf_counter() - started)

    product(), copy()
    return product, copy
