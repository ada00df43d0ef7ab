"""Products of activations with a layer's weight, and how activations are shaped for XLA.

Without a mesh all of an activation's leading dimensions are merged before it is worked on. The numbers are the same;
XLA's CPU backend copies the operands of products that have more than one row or column dimension, and reduces arrays
with a leading dimension of 1 thirty times slower (BUILD_NOTES.md). On a mesh the dimensions stay apart, because they
may be split over different axes.
"""

import functools
import math

import jax
from jax import lax

from mmx.parallel import spec
from mmx.parallel.axes import LogicalAxes


def merge_leading(x: jax.Array, keep: int = 1) -> jax.Array:
    """Merges all but the last ``keep`` dimensions, unless a mesh is in scope."""
    if not jax.sharding.get_abstract_mesh().empty:
        return x
    return x.reshape(-1, *x.shape[x.ndim - keep :])


def linear(x: jax.Array, weight: jax.Array, axes: LogicalAxes, contract: int = 1) -> jax.Array:
    """Contracts the last ``contract`` dimensions of x with the first of ``weight``.

    Args:
      axes: logical axes of the result. Where they split what the contraction leaves summed in parts (the heads of an
        output projection), the sum over devices is a reduce-scatter.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _product(x, weight, contract)
    dimensions = (tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))), ((), ())
    return lax.dot_general(x, weight, dimensions, out_sharding=spec(*axes))


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _product(x: jax.Array, weight: jax.Array, contract: int) -> jax.Array:
    # Checkpointed so that the operands are kept as they came in: a scan over layers would copy their reshaped forms.
    inner = math.prod(weight.shape[:contract])
    leading = x.shape[: x.ndim - contract]
    rows = merge_leading(x.reshape(*leading, inner))
    y = lax.dot_general(rows, weight.reshape(inner, -1), (((rows.ndim - 1,), (0,)), ((), ())))
    return y.reshape(*leading, *weight.shape[contract:])
