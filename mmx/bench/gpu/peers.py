"""The same attention in other libraries, where they are installed: FLA (Triton) and jax-linear-attention (Mosaic GPU).

FLA's ``lightning_attn`` has other decays than the released model; its ``chunk_simple_gla`` with a constant decay a head
and scale 1 is the same operation. jax-linear-attention wants a decay for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from mmx.bench.gpu.attention import BACKWARD, CHANNELS, FORWARD, SHAPES, failed, result, slopes
from mmx.bench.gpu.clock import seconds_a_call

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink


def measure_fla(sink: Sink) -> None:
    """FLA's chunked kernels in PyTorch. Triton compiles and tries about 160 forms of them first: four minutes."""
    try:
        import torch
        from fla.ops.simple_gla import chunk_simple_gla  # noqa: F401
    except ImportError as error:
        sink.result(f"FLA is not installed: {error}", failed="not installed")
        return
    name = f"FLA {version('fla-core')} chunk_simple_gla"
    for length, heads in SHAPES:
        for direction in (FORWARD, BACKWARD):
            try:
                call = _fla_call(direction, length, heads)
                seconds = seconds_a_call(call, wait=lambda _: torch.cuda.synchronize())
            except Exception as error:
                failed(sink, name, direction, length, heads, error)
            else:
                result(sink, name, direction, length, heads, seconds)
            call = None
            torch.cuda.empty_cache()


def _fla_call(direction: str, length: int, heads: int) -> Callable[[], Any]:
    """Draws operands, and returns what works on them."""
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    decay_H = -torch.tensor(np.asarray(slopes(heads), np.float32), device="cuda")
    shape = (1, length, heads, CHANNELS)
    arrays = 3 if direction == FORWARD else 4
    q, k, v, *cotangent = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(arrays))

    def forward() -> Any:
        return chunk_simple_gla(q, k, v, g_gamma=decay_H, scale=1.0)[0]

    def both() -> Any:
        return torch.autograd.grad(forward(), (q, k, v), *cotangent)

    if direction == FORWARD:
        return torch.no_grad()(forward)
    for x in (q, k, v):
        x.requires_grad_()
    return both


def measure_jla(sink: Sink) -> None:
    """jax-linear-attention's Hopper kernels."""
    import jax
    import jax.numpy as jnp

    from mmx.bench.gpu.attention import time_jax

    try:
        import jla.ops.mosaic_gpu  # noqa: F401 - registers the kernels
        from jla.ops import linear_attention
    except ImportError as error:
        sink.result(f"jax-linear-attention is not installed: {error}", failed="not installed")
        return
    name = f"jax-linear-attention {version('jax-linear-attention')} simple_gla"

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, g_BSH: jax.Array) -> jax.Array:
        return linear_attention("simple_gla", q, k, v, g=g_BSH, scale=1.0, impl="mosaic_gpu")[0]

    for length, heads in SHAPES:
        decay_BSH = jnp.broadcast_to(-jnp.asarray(slopes(heads), jnp.float32), (1, length, heads))
        time_jax(sink, name, attend, length, heads, (decay_BSH,))
