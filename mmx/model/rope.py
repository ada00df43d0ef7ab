"""Rotary position embedding on the first channels of each head, rotate-half pairs (report section 2; released code).

Shapes: ... leading dimensions (batch and perhaps sequence), H heads, K head channels, F = rotary_dim / 2 frequencies.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RopeTable(NamedTuple):
    """Cosines and sines of each token's angles, fp32 [..., F]."""

    cos: jax.Array
    sin: jax.Array


def rope_table(positions: jax.Array, rotary_dim: int, base: float) -> RopeTable:
    """Angles ``position * base^(-2f / rotary_dim)`` for f = 0 .. F-1, from int32 positions [...]."""
    frequencies_F = base ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies_F
    return RopeTable(jnp.cos(angles), jnp.sin(angles))


def apply_rope(x_HK: jax.Array, table: RopeTable) -> jax.Array:
    """Rotates channels (f, f + F) of x [..., H, K] for f < F; channels from 2F on pass through. In fp32, cast back."""
    F = table.cos.shape[-1]
    cos, sin = table.cos[..., None, :], table.sin[..., None, :]
    first, second, rest = x_HK[..., :F], x_HK[..., F : 2 * F], x_HK[..., 2 * F :]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(half.astype(x_HK.dtype) for half in rotated), rest], axis=-1)
