"""RMSNorm. Shapes: ... any leading dimensions, D channels."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mmx.model.linear import merge_leading
from mmx.model.parameters import weight


class RMSNorm(nnx.Module):
    """Scales to unit mean square. Statistics in fp32; the cast to the input's dtype comes before the weight."""

    def __init__(self, width: int, eps: float, param_dtype: str):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), param_dtype), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last dimension; same shape and dtype."""
        return _normalise(x, weight(self.scale, x.dtype), self.eps)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _normalise(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    # Checkpointed: the backward pass keeps the input alone.
    rows = merge_leading(x)
    wide = rows.astype(jnp.promote_types(jnp.float32, x.dtype))
    wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide.astype(x.dtype) * scale_D).reshape(x.shape)
