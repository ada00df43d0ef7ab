"""The same attention in other libraries, where they are installed: FLA (Triton) and jax-linear-attention (Mosaic GPU).

FLA's ``lightning_attn`` has other decays than the released model; its ``chunk_simple_gla`` with a constant decay a head
and scale 1 is the same operation. jax-linear-attention wants a decay for every token.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from mmx.bench.gpu.attention import CHANNELS, HEADS, LENGTHS, failed, slopes, time_both

if TYPE_CHECKING:
    from mmx.bench.gpu.sections import Sink


def measure_fla(sink: Sink) -> None:
    """FLA's chunked kernels in PyTorch."""
    try:
        import torch
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        sink.result(f"FLA is not installed: {error}", failed="not installed")
        return
    name = f"FLA {version('fla-core')} chunk_simple_gla"
    decay_H = -torch.tensor(np.asarray(slopes(), np.float32), device="cuda")
    for length in LENGTHS:
        try:
            shape = (1, length, HEADS, CHANNELS)
            q, k, v, do = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4))
            for x in (q, k, v):
                x.requires_grad_()

            def forward(q=q, k=k, v=v):
                with torch.no_grad():
                    return chunk_simple_gla(q, k, v, g_gamma=decay_H, scale=1.0)[0]

            def both(q=q, k=k, v=v, do=do):
                o = chunk_simple_gla(q, k, v, g_gamma=decay_H, scale=1.0)[0]
                return torch.autograd.grad(o, (q, k, v), do)

            time_both(sink, name, length, forward, both, wait=lambda _: torch.cuda.synchronize())
        except Exception as error:
            failed(sink, name, length, error)
        q = k = v = do = forward = both = None
        torch.cuda.empty_cache()


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
    decay_H = -jnp.asarray(slopes(), jnp.float32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, g_BSH: jax.Array) -> jax.Array:
        return linear_attention("simple_gla", q, k, v, g=g_BSH, scale=1.0, impl="mosaic_gpu")[0]

    for length in LENGTHS:
        # An argument: XLA would spend minutes on folding what can be computed from a constant.
        time_jax(sink, name, attend, length, (jnp.broadcast_to(decay_H, (1, length, HEADS)),))
