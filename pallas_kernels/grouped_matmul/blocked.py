"""Grouped matrix product as loops over (group, block of rows) items, in plain JAX: any backend, no padding of groups.

``lax.ragged_dot`` expands densely on CPU and GPU, E times the work. Here each item is one dense product of R rows with
one group's matrix, and the number of items is decided at run time: groups without rows cost nothing, their matrices are
not even read. A first loop takes each group's large blocks, which are full. A second takes what is left in small
blocks; the last of a group reaches into rows that are not the group's, and leaves those as they are.

Shapes: M rows sorted by group, E groups, D input channels, F output channels, R rows in a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Blocks(NamedTuple):
    """Rows in a large and in a small block, neither more than M."""

    large: int
    small: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul_blocked(x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, blocks: Blocks) -> jax.Array:
    """Grouped product; ``op.py`` states the contract."""
    return _product(x_MD, w_EDF, group_sizes_E, blocks, transposed=False)


def _forward(x_MD, w_EDF, group_sizes_E, blocks):
    return grouped_matmul_blocked(x_MD, w_EDF, group_sizes_E, blocks), (x_MD, w_EDF, group_sizes_E)


def _backward(blocks, residuals, dy_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    dx_MD = _product(dy_MF, w_EDF, group_sizes_E, blocks, transposed=True)
    return dx_MD, _outer(x_MD, dy_MF, group_sizes_E, blocks).astype(w_EDF.dtype), None


grouped_matmul_blocked.defvjp(_forward, _backward)


def _fold(
    group_sizes_E: jax.Array,
    num_rows: int,
    blocks: Blocks,
    step: Callable[[jax.Array, jax.Array, jax.Array, int, jax.Array | None], jax.Array],
    result: jax.Array,
) -> jax.Array:
    """Folds ``step(result, group, first row, R, mine_R1)`` over all blocks of rows.

    ``mine_R1`` marks the block's rows that are the group's and that no other block has; None means all of them.
    """
    end_E = jnp.cumsum(group_sizes_E)
    full_E = group_sizes_E // blocks.large
    rest_E = group_sizes_E - full_E * blocks.large
    partial_E = (rest_E + blocks.small - 1) // blocks.small

    def run(result, size, count_E, first_E, is_full):
        until_E = jnp.cumsum(count_E)

        def item(n, result):
            e = jnp.sum(until_E <= n)
            first = first_E[e] + (n - (until_E - count_E)[e]) * size
            if is_full:
                return step(result, e, first, size, None)
            # Near the end of the rows the block starts earlier, so that it still has R of them.
            row = jnp.minimum(first, num_rows - size)
            index_R = row + jnp.arange(size)
            return step(result, e, row, size, ((index_R >= first) & (index_R < end_E[e]))[:, None])

        return lax.fori_loop(0, until_E[-1], item, result)

    result = run(result, blocks.large, full_E, end_E - group_sizes_E, True)
    return run(result, blocks.small, partial_E, end_E - rest_E, False)


def _product(x_MD, w_EDF, group_sizes_E, blocks, *, transposed: bool) -> jax.Array:
    """Rows times their group's matrix, or its transpose; rows beyond the last group give zero."""
    spec, width = ("rd,fd->rf", w_EDF.shape[1]) if transposed else ("rd,df->rf", w_EDF.shape[2])

    def step(y_MF, e, row, size, mine_R1):
        x_RD = lax.dynamic_slice_in_dim(x_MD, row, size)
        y_RF = jnp.einsum(spec, x_RD, w_EDF[e], preferred_element_type=_wide(x_MD.dtype)).astype(y_MF.dtype)
        if mine_R1 is not None:
            y_RF = jnp.where(mine_R1, y_RF, lax.dynamic_slice_in_dim(y_MF, row, size))
        return lax.dynamic_update_slice_in_dim(y_MF, y_RF, row, axis=0)

    return _fold(group_sizes_E, x_MD.shape[0], blocks, step, jnp.zeros((x_MD.shape[0], width), x_MD.dtype))


def _outer(x_MD, dy_MF, group_sizes_E, blocks) -> jax.Array:
    """Sum of the outer products of each group's rows, fp32 [E, D, F]."""

    def step(dw_EDF, e, row, size, mine_R1):
        x_RD, dy_RF = (lax.dynamic_slice_in_dim(a, row, size) for a in (x_MD, dy_MF))
        if mine_R1 is not None:
            x_RD = jnp.where(mine_R1, x_RD, 0)
        return dw_EDF.at[e].add(jnp.einsum("rd,rf->df", x_RD, dy_RF, preferred_element_type=dw_EDF.dtype))

    zeros = jnp.zeros((group_sizes_E.shape[0], x_MD.shape[1], dy_MF.shape[1]), _wide(x_MD.dtype))
    return _fold(group_sizes_E, x_MD.shape[0], blocks, step, zeros)


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, dtype)
