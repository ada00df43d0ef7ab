"""Grouped matrix product as a loop over (group, block of rows) items, in plain JAX: any backend, no padding of groups.

``lax.ragged_dot`` expands densely on CPU and GPU, E times the work. Here each item is one dense product of R rows with
one group's matrix, and the number of items is decided at run time: groups without rows cost nothing, their matrices are
not even read. A group's last block reaches into the next group's rows; what it writes there is overwritten, because
items run in the order of the groups.

Shapes: M rows sorted by group, E groups, D input channels, F output channels, R rows in a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul_blocked(x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, block: int) -> jax.Array:
    """Grouped product; ``op.py`` states the contract. ``block`` is R."""
    return _product(x_MD, w_EDF, group_sizes_E, block, transposed=False)


def _forward(x_MD, w_EDF, group_sizes_E, block):
    return grouped_matmul_blocked(x_MD, w_EDF, group_sizes_E, block), (x_MD, w_EDF, group_sizes_E)


def _backward(block, residuals, dy_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    dx_MD = _product(dy_MF, w_EDF, group_sizes_E, block, transposed=True)
    return dx_MD, _outer(x_MD, dy_MF, group_sizes_E, block).astype(w_EDF.dtype), None


grouped_matmul_blocked.defvjp(_forward, _backward)


class _Items(NamedTuple):
    """The work list: item n is block ``n - first_E[e]`` of the group e that contains it."""

    ends_E: jax.Array  # items up to and including each group
    first_E: jax.Array
    row_E: jax.Array  # first row of each group
    row_end_E: jax.Array

    @classmethod
    def of(cls, group_sizes_E: jax.Array, block: int) -> "_Items":
        blocks_E = (group_sizes_E + block - 1) // block
        ends_E, row_end_E = jnp.cumsum(blocks_E), jnp.cumsum(group_sizes_E)
        return cls(ends_E, ends_E - blocks_E, row_end_E - group_sizes_E, row_end_E)

    def locate(self, n: jax.Array, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Group of item n, its first row, and which of its R rows are the group's, as a [R, 1] mask."""
        e = jnp.sum(self.ends_E <= n)
        row = self.row_E[e] + (n - self.first_E[e]) * block
        return e, row, (row + jnp.arange(block) < self.row_end_E[e])[:, None]

    def run(self, step, result: jax.Array) -> jax.Array:
        """Folds ``step(n, result)`` over all items."""
        return lax.fori_loop(0, self.ends_E[-1], step, result)


def _product(x_MD, w_EDF, group_sizes_E, block, *, transposed: bool) -> jax.Array:
    """Rows times their group's matrix, or its transpose; rows beyond the last group give zero."""
    M = x_MD.shape[0]
    items = _Items.of(group_sizes_E, block)
    x_MD = jnp.pad(x_MD, ((0, block), (0, 0)))
    spec = "rd,fd->rf" if transposed else "rd,df->rf"

    def step(n, y_MF):
        e, row, mine_R1 = items.locate(n, block)
        x_RD = lax.dynamic_slice_in_dim(x_MD, row, block)
        y_RF = jnp.einsum(spec, x_RD, w_EDF[e], preferred_element_type=_wide(x_MD.dtype))
        y_RF = jnp.where(mine_R1, y_RF, 0).astype(y_MF.dtype)
        return lax.dynamic_update_slice_in_dim(y_MF, y_RF, row, axis=0)

    width = w_EDF.shape[1] if transposed else w_EDF.shape[2]
    return items.run(step, jnp.zeros((M + block, width), x_MD.dtype))[:M]


def _outer(x_MD, dy_MF, group_sizes_E, block) -> jax.Array:
    """Sum of the outer products of each group's rows, fp32 [E, D, F]."""
    items = _Items.of(group_sizes_E, block)
    x_MD, dy_MF = (jnp.pad(a, ((0, block), (0, 0))) for a in (x_MD, dy_MF))

    def step(n, dw_EDF):
        e, row, mine_R1 = items.locate(n, block)
        x_RD = jnp.where(mine_R1, lax.dynamic_slice_in_dim(x_MD, row, block), 0)
        dy_RF = lax.dynamic_slice_in_dim(dy_MF, row, block)
        return dw_EDF.at[e].add(jnp.einsum("rd,rf->df", x_RD, dy_RF, preferred_element_type=dw_EDF.dtype))

    zeros = jnp.zeros((group_sizes_E.shape[0], x_MD.shape[1], dy_MF.shape[1]), _wide(x_MD.dtype))
    return items.run(step, zeros)


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, dtype)
