"""Grouped matrix product on TPU: jax's megablox kernels, with fp32 sums in VMEM.

``lax.ragged_dot`` has kernels on TPU too. Asked for fp32 sums it writes fp32 results and converts them afterwards, and
the backward pass copies all matrices transposed; these kernels do neither (BUILD_NOTES.md has the compiler's figures).

Shapes: M rows sorted by group, E groups, D input channels, F output channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from pallas_kernels.grouped_matmul.tpu_tiles import Tile, Tiles


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul_tpu(
    x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, tiles: Tiles, interpret: bool = False
) -> jax.Array:
    """Grouped product; ``op.py`` states the contract."""
    return _product(x_MD, w_EDF, group_sizes_E, tiles, interpret, transposed=False)


def _forward(x_MD, w_EDF, group_sizes_E, tiles, interpret):
    return grouped_matmul_tpu(x_MD, w_EDF, group_sizes_E, tiles, interpret), (x_MD, w_EDF, group_sizes_E)


def _backward(tiles, interpret, residuals, dy_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    dx_MD = _product(dy_MF, w_EDF, group_sizes_E, tiles, interpret, transposed=True)
    tile = tiles.gradient.within(*w_EDF.shape[1:])
    x_MD, dy_MF = (_whole_tiles(x, tile) for x in (x_MD, dy_MF))
    dw_EDF = tgmm(x_MD.swapaxes(0, 1), dy_MF, group_sizes_E, w_EDF.dtype, tuple(tile), interpret=interpret)
    return dx_MD, dw_EDF, None


grouped_matmul_tpu.defvjp(_forward, _backward)


def unsupported(x_MD: jax.Array) -> str | None:
    """Why the kernels, as far as they are tested, do not take these operands, or None."""
    if x_MD.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 and float32, not {x_MD.dtype}"
    return None


def _product(x_MD, w_EDF, group_sizes_E, tiles, interpret, *, transposed: bool) -> jax.Array:
    M, contracted = x_MD.shape
    tile = tiles.product.within(contracted, w_EDF.shape[1 if transposed else 2])
    rows_MD, how = _whole_tiles(x_MD, tile), {"transpose_rhs": transposed, "interpret": interpret}
    y_MF = gmm(rows_MD, w_EDF, group_sizes_E, x_MD.dtype, tuple(tile), **how)[:M]
    # Nothing is written for rows beyond the last group.
    return jnp.where(jnp.arange(M)[:, None] < jnp.sum(group_sizes_E), y_MF, 0)


def _whole_tiles(x_MD: jax.Array, tile: Tile) -> jax.Array:
    return jnp.pad(x_MD, ((0, -x_MD.shape[0] % tile.rows), (0, 0)))
