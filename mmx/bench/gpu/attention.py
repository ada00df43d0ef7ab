"""Lightning attention at the released shape, and softmax attention beside it, over growing lengths."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mmx.bench.gpu.clock import seconds_a_call
from pallas_kernels.lightning_attention import layer_slopes, lightning_attention
from pallas_kernels.softmax_attention import softmax_attention

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink

HEADS, CHANNELS = 64, 128
LENGTHS = (4096, 32768, 262144, 1048576)
# Softmax attention stops here: its time grows with the square.
SOFTMAX_LENGTHS = (4096, 32768, 131072)
FORWARD, BACKWARD = "forward", "forward and backward"


def slopes() -> Any:
    """Decay slopes of the released model's first layer, [H]."""
    return layer_slopes(HEADS, 0, 80)


def operands(length: int) -> list[jax.Array]:
    """Queries, keys, values and an output cotangent, [1, S, H, K] bf16 each."""
    draw = jax.jit(lambda key: jax.random.normal(key, (1, length, HEADS, CHANNELS), jnp.bfloat16))
    return [draw(key) for key in jax.random.split(jax.random.key(0), 4)]


def measure(sink: Sink) -> None:
    """Our operations, forced implementations included."""
    lightning = functools.partial(lightning_attention, slopes_H=jnp.asarray(slopes()))
    for length in LENGTHS:
        time_jax(sink, "mmx lightning, blocked", lambda *qkv: lightning(*qkv, implementation="blocked")[0], length)
    for implementation in ("cudnn", "blocked"):
        attend = functools.partial(softmax_attention, implementation=implementation)
        for length in SOFTMAX_LENGTHS if implementation == "cudnn" else SOFTMAX_LENGTHS[:2]:
            time_jax(sink, f"mmx softmax, {implementation}", attend, length)


def time_jax(
    sink: Sink, name: str, attend: Callable[..., jax.Array], length: int, constants: tuple[jax.Array, ...] = ()
) -> None:
    """Times ``attend(q, k, v, *constants) -> o`` and its gradients with respect to q, k and v."""

    @jax.jit
    def gradients(q, k, v, do, *constants):
        o, back = jax.vjp(lambda q, k, v: attend(q, k, v, *constants), q, k, v)
        return o, back(do)

    try:
        *qkv, do = operands(length)
        forward = jax.jit(attend)
        time_both(
            sink,
            name,
            length,
            lambda: forward(*qkv, *constants),
            lambda: gradients(*qkv, do, *constants),
            wait=jax.block_until_ready,
        )
    except Exception as error:
        failed(sink, name, length, error)


def time_both(
    sink: Sink,
    name: str,
    length: int,
    forward: Callable[[], Any],
    both: Callable[[], Any],
    wait: Callable[[Any], Any],
) -> None:
    """Times and reports the forward pass, and the forward and backward passes together."""
    for direction, call in ((FORWARD, forward), (BACKWARD, both)):
        try:
            seconds = seconds_a_call(call, wait)
        except Exception as error:
            failed(sink, f"{name}, {direction}", length, error)
            continue
        per_token_and_head = seconds / (length * HEADS)
        sink.result(
            f"{name}, {direction}, {length:,} tokens: {seconds * 1e3:,.2f} ms, "
            f"{per_token_and_head * 1e9:.3f} ns a token and head",
            name=name,
            direction=direction,
            length=length,
            seconds=seconds,
        )


def failed(sink: Sink, name: str, length: int, error: Exception) -> None:
    """Reports what could not be measured, with the first line of the reason."""
    text = str(error).strip().splitlines() or [type(error).__name__]
    is_memory = "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error)
    reason = "out of memory" if is_memory else f"{type(error).__name__}: {text[0][:200]}"
    sink.result(f"{name}, {length:,} tokens: {reason}", name=name, length=length, failed=reason)
