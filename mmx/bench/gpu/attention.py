"""Lightning attention at the released shape, and softmax attention beside it, over growing lengths.

Shapes: S tokens, H heads, K channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.bench.gpu.clock import compile_if_it_fits, seconds_a_call
from mmx.bench.gpu.profile import report_operations, slowest_operations
from pallas_kernels.lightning_attention import layer_slopes, lightning_attention
from pallas_kernels.softmax_attention import softmax_attention

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink

CHANNELS = 128
# (S, H). With all heads, operands, result, cotangent and gradients of 1M tokens are eight arrays of 16 GiB: a quarter
# of the heads shows what a backward pass takes at that length.
SHAPES = ((4096, 64), (32768, 64), (262144, 64), (1048576, 64), (1048576, 16))
SOFTMAX_SHAPES = SHAPES[:4]
# The blocked form, for packed rows, would take minutes on longer ones.
SOFTMAX_BLOCKED_SHAPES = SHAPES[:2]
# Softmax attention's time grows with the square of S: no call is begun that the one before says takes longer than this.
MOST_SECONDS = 60.0
FORWARD, BACKWARD = "forward", "forward and backward"
_PROFILED = (32768, 64)
# Tokens that are drawn; longer operands repeat them, because drawing needs several times the memory of what is drawn.
_DRAWN = 32768


def slopes(heads: int) -> np.ndarray:
    """Decay slopes of the first of 80 layers, [H]."""
    return layer_slopes(heads, 0, 80)


def measure(sink: Sink) -> None:
    """Our operations, forced implementations included."""
    for length, heads in SHAPES:
        slopes_H = jnp.asarray(slopes(heads))
        lightning = functools.partial(lightning_attention, slopes_H=slopes_H, implementation="blocked")
        time_jax(sink, "mmx lightning, blocked", lambda *qkv, run=lightning: run(*qkv)[0], length, heads)
    _say_where_time_goes(sink, *_PROFILED)
    for implementation, shapes in (("cudnn", SOFTMAX_SHAPES), ("blocked", SOFTMAX_BLOCKED_SHAPES)):
        attend = functools.partial(softmax_attention, implementation=implementation)
        before: dict[str, float] = {}
        for index, (length, heads) in enumerate(shapes):
            growth = (length / shapes[index - 1][0]) ** 2
            expected = {direction: seconds * growth for direction, seconds in before.items()}
            name = f"mmx softmax, {implementation}"
            before = expected | time_jax(sink, name, attend, length, heads, expected=expected)


def _say_where_time_goes(sink: Sink, length: int, heads: int) -> None:
    """Profiles our lightning attention, forward and backward."""
    slopes_H = jnp.asarray(slopes(heads))

    @jax.jit
    def gradients(q, k, v, do):
        o, back = jax.vjp(lambda *qkv: lightning_attention(*qkv, slopes_H, implementation="blocked")[0], q, k, v)
        return o, back(do)

    arguments = _draw(4, length, heads)
    jax.block_until_ready(gradients(*arguments))
    slowest, total = slowest_operations(lambda: jax.block_until_ready(gradients(*arguments)))
    sink.say(f"where {total * 1e3:,.1f} ms of lightning attention, {BACKWARD}, {length:,} tokens, go:")
    report_operations(sink, slowest, total)


def time_jax(
    sink: Sink,
    name: str,
    attend: Callable[..., jax.Array],
    length: int,
    heads: int,
    constants: tuple[jax.Array, ...] = (),
    expected: dict[str, float] | None = None,
) -> dict[str, float]:
    """Times ``attend(q, k, v, *constants) -> o``, [1, S, H, K] bf16 each, and its gradients by q, k and v.

    Args:
      constants: further arguments; what XLA can compute from a closed-over constant it folds, for minutes.
      expected: seconds a direction that are known before; what would take longer than ``MOST_SECONDS`` is not run.

    Returns:
      Direction to measured seconds.
    """

    def gradients(q, k, v, do, *constants):
        o, back = jax.vjp(lambda q, k, v: attend(q, k, v, *constants), q, k, v)
        return o, back(do)

    measured = {}
    for direction, function, operands in ((FORWARD, attend, 3), (BACKWARD, gradients, 4)):
        if expected and expected.get(direction, 0) > MOST_SECONDS:
            reason = f"not run, {expected[direction]:.0f} s expected from the time of the length before"
            _failed(sink, name, direction, length, heads, reason)
            continue
        try:
            shapes = [jax.ShapeDtypeStruct((1, length, heads, CHANNELS), jnp.bfloat16)] * operands
            compiled, compile_seconds = compile_if_it_fits(function, *shapes, *constants)
            # Not kept from one direction to the next: at 1M tokens the forward pass has no room for the cotangent.
            arguments = (*_draw(operands, length, heads), *constants)
            seconds = seconds_a_call(lambda: compiled(*arguments), jax.block_until_ready, compiled=True)  # noqa: B023
        except Exception as error:
            failed(sink, name, direction, length, heads, error)
        else:
            measured[direction] = seconds
            result(sink, name, direction, length, heads, seconds, compile_seconds=compile_seconds)
        arguments = compiled = None
    return measured


def _draw(arrays: int, length: int, heads: int) -> list[jax.Array]:
    """Random arrays [1, S, H, K] bf16."""
    repeats = max(1, length // _DRAWN)

    @jax.jit
    def draw(key):
        return jnp.tile(
            jax.random.normal(key, (1, length // repeats, heads, CHANNELS), jnp.bfloat16), (1, repeats, 1, 1)
        )

    return [draw(key) for key in jax.random.split(jax.random.key(0), arrays)]


def result(sink: Sink, name: str, direction: str, length: int, heads: int, seconds: float, **more: Any) -> None:
    """Reports a time."""
    compiled = f", compiled in {more['compile_seconds']:.1f} s" if "compile_seconds" in more else ""
    sink.result(
        f"{name}, {direction}, {length:,} tokens, {heads} heads: {seconds * 1e3:,.2f} ms, "
        f"{seconds / (length * heads) * 1e9:.3f} ns a token and head{compiled}",
        name=name,
        direction=direction,
        length=length,
        heads=heads,
        seconds=seconds,
        **more,
    )


def failed(sink: Sink, name: str, direction: str, length: int, heads: int, error: Exception) -> None:
    """Reports what could not be measured, with the first line of the reason."""
    _failed(sink, name, direction, length, heads, describe(error))


def _failed(sink: Sink, name: str, direction: str, length: int, heads: int, reason: str) -> None:
    sink.result(
        f"{name}, {direction}, {length:,} tokens, {heads} heads: {reason}",
        name=name,
        direction=direction,
        length=length,
        heads=heads,
        failed=reason,
    )


def describe(error: Exception) -> str:
    """An error in a line."""
    if isinstance(error, MemoryError):
        return str(error)
    if "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
