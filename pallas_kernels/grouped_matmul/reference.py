"""Grouped matrix product with every row against every matrix: slow, obvious, differentiable by JAX itself.

Shapes: M rows, E groups, D input channels, F output channels.
"""

import jax
import jax.numpy as jnp


def grouped_matmul_reference(x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Computes all M x E products and keeps, for each row, that of its own group."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_M1 = jnp.arange(x_MD.shape[0])[:, None]
    member_ME = (row_M1 < ends_E) & (row_M1 >= ends_E - group_sizes_E)
    y_MEF = jnp.einsum("md,edf->mef", x_MD, w_EDF, precision="highest")
    return jnp.einsum("mef,me->mf", y_MEF, member_ME.astype(y_MEF.dtype), precision="highest")
