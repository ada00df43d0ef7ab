"""Grouped matrix product as one batched product, in plain JAX: for GPUs, where a loop's small products waste the chip.

Each group is padded to whole blocks, and each block is multiplied with a copy of its group's matrix. There are at most
M / R + E blocks whatever the groups' sizes, so shapes are static and nothing is dropped. It costs up to E blocks of
padding and N copies of a matrix; ``op.py`` says when that is worth it.

Shapes: M rows sorted by group, E groups, D input channels, F output channels, N blocks of R rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class _Plan(NamedTuple):
    """Where rows go."""

    group_N: jax.Array  # group of each block; E for a block without rows
    source_NR: jax.Array  # row in each place of each block; M for none
    place_M: jax.Array  # place of each row, counting through the blocks; N * R for a row beyond the last group


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul_padded(x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, block: int) -> jax.Array:
    """Grouped product; ``op.py`` states the contract. ``block`` is R."""
    return _forward(x_MD, w_EDF, group_sizes_E, block)[0]


def _forward(x_MD, w_EDF, group_sizes_E, block):
    plan = _plan(group_sizes_E, x_MD.shape[0], block)
    y_NRF = jnp.einsum("nrd,ndf->nrf", _take(x_MD, plan.source_NR), _take(w_EDF, plan.group_N))
    return _rows(y_NRF, plan), (x_MD, w_EDF, group_sizes_E)


def _backward(block, residuals, dy_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    plan = _plan(group_sizes_E, x_MD.shape[0], block)
    dy_NRF = _take(dy_MF, plan.source_NR)
    dx_NRD = jnp.einsum("nrf,ndf->nrd", dy_NRF, _take(w_EDF, plan.group_N))
    wide = jnp.promote_types(jnp.float32, x_MD.dtype)
    dw_NDF = jnp.einsum("nrd,nrf->ndf", _take(x_MD, plan.source_NR), dy_NRF, preferred_element_type=wide)
    # A product with zeros and ones adds a group's blocks in a fixed order; a scatter would not.
    mine_EN = (plan.group_N == jnp.arange(w_EDF.shape[0])[:, None]).astype(dw_NDF.dtype)
    dw_EDF = jnp.einsum("en,ndf->edf", mine_EN, dw_NDF, precision="highest")
    return _rows(dx_NRD, plan), dw_EDF.astype(w_EDF.dtype), None


grouped_matmul_padded.defvjp(_forward, _backward)


def _plan(group_sizes_E: jax.Array, num_rows: int, block: int) -> _Plan:
    E = group_sizes_E.shape[0]
    N = most_blocks(num_rows, E, block)
    end_E = jnp.cumsum(group_sizes_E)
    blocks_E = (group_sizes_E + block - 1) // block
    until_E = jnp.cumsum(blocks_E)
    group_N = jnp.searchsorted(until_E, jnp.arange(N), side="right")
    # Rows of group e are moved forward by the padding of the groups before it.
    shift_E = (until_E - blocks_E) * block - (end_E - group_sizes_E)
    place_NR = jnp.arange(N * block).reshape(N, block)
    source_NR = place_NR - _take(shift_E, group_N)[:, None]
    is_row = (group_N[:, None] < E) & (source_NR < _take(end_E, group_N)[:, None])
    row_M = jnp.arange(num_rows)
    group_M = jnp.searchsorted(end_E, row_M, side="right")
    place_M = jnp.where(group_M < E, row_M + _take(shift_E, group_M), N * block)
    return _Plan(group_N, jnp.where(is_row, source_NR, num_rows), place_M)


def most_blocks(rows: int, groups: int, block: int) -> int:
    """N: enough for any sizes of the groups."""
    return rows // block + min(groups, rows)


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """Entries along the first dimension; zeros for an index beyond its end."""
    return array.at[index].get(mode="fill", fill_value=0)


def _rows(blocks_NRF: jax.Array, plan: _Plan) -> jax.Array:
    return _take(blocks_NRF.reshape(-1, blocks_NRF.shape[-1]), plan.place_M)
