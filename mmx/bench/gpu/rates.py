"""What the chip gives: the denominators of everything else in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from mmx.bench.gpu.clock import seconds_a_call

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink


def measure(sink: Sink) -> None:
    """Copy bandwidth within the memory, and the rate of a large bf16 matrix product."""
    device = jax.devices()[0]
    sink.result(f"{device.device_kind}, jax {jax.__version__}", device=device.device_kind, jax=jax.__version__)

    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.bfloat16)
    add = jax.jit(lambda x: x + 1)
    bandwidth = 2 * x.nbytes / seconds_a_call(lambda: add(x), jax.block_until_ready)
    sink.result(f"copy of {x.nbytes / 1e9:.1f} GB: {bandwidth / 1e12:.2f} TB/s read and written", bandwidth=bandwidth)

    a = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    multiply = jax.jit(lambda a: a @ a)
    rate = 2 * 8192**3 / seconds_a_call(lambda: multiply(a), jax.block_until_ready)
    sink.result(f"bf16 matrix product of 8192 cubed: {rate / 1e12:.0f} TFLOP/s", matmul=rate)
