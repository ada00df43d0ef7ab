"""How parameters are made and used: initial values, logical axes, compute dtype."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mmx.parallel import gather_weight


def xavier(
    key: jax.Array,
    shape: Sequence[int],
    axes: Sequence[str | None],
    dtype: str,
    *,
    fan_in: int,
    fan_out: int,
    gain: float = 1.0,
) -> nnx.Param:
    """A Xavier-normal parameter: standard deviation gain * sqrt(2 / (fan_in + fan_out)).

    Args:
      axes: logical axis of each dimension (``mmx.parallel.axes``).
      fan_in, fan_out: of one matrix, whatever is stacked or packed beside it.
      gain: DeepNorm's beta for the matrices that get it.
    """
    std = gain * math.sqrt(2.0 / (fan_in + fan_out))
    return nnx.Param((std * jax.random.normal(key, shape, jnp.float32)).astype(dtype), axes=tuple(axes))


def deepnorm_gain(num_layers: int) -> float:
    """DeepNorm's beta, (8 N)^(-1/4): the initial gain of value, output and expert matrices (report section 2)."""
    return (8 * num_layers) ** -0.25


def weight(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """The parameter as a layer computes with it: in the compute dtype, gathered over FSDP."""
    return gather_weight(param[...].astype(dtype), param.get_metadata("axes"))
