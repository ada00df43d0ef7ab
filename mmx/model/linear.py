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


def linear(x: jax.Array, weight: jax.Array, axes: LogicalAxes, *, contract: int = 1, merged: bool = False) -> jax.Array:
    """Contracts the last ``contract`` dimensions of x with as many elements of the first dimensions of ``weight``.

    Args:
      axes: logical axes of the result. Where they split what the contraction leaves summed in parts (the heads of an
        output projection), the sum over devices is a reduce-scatter.
      merged: leave the weight's other dimensions one dimension, [..., H * K] for [..., H, K]. On TPU the two lie
        differently in memory, and going from one to the other is a copy.
    """
    inner = math.prod(x.shape[x.ndim - contract :])
    leading = x.shape[: x.ndim - contract]
    used = next(n for n in range(1, weight.ndim) if math.prod(weight.shape[:n]) == inner)
    rows = x.reshape(*leading, inner)
    if jax.sharding.get_abstract_mesh().empty:
        y = _product(rows, weight, inner)
    else:
        dimensions = ((len(leading),), (0,)), ((), ())
        out_sharding = spec(*axes[: len(leading) + 1])
        y = lax.dot_general(rows, weight.reshape(inner, -1), dimensions, out_sharding=out_sharding)
    return y if merged else y.reshape(*leading, *weight.shape[used:])


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _product(x: jax.Array, weight: jax.Array, inner: int) -> jax.Array:
    # Checkpointed so that the operands are kept as they came in: a scan over layers would copy their reshaped forms.
    rows = merge_leading(x)
    y = lax.dot_general(rows, weight.reshape(inner, -1), (((rows.ndim - 1,), (0,)), ((), ())))
    return y.reshape(*x.shape[:-1], -1)
