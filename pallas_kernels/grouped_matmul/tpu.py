"""Grouped matrix product on TPU: jax's megablox kernels, with fp32 sums in VMEM.

``lax.ragged_dot`` has kernels on TPU too. Asked for fp32 sums it writes fp32 results and converts them afterwards, and
the backward pass copies all matrices transposed; these kernels do neither (BUILD_NOTES.md has the compiler's figures).

Shapes: M rows sorted by group, E groups, D input channels, F output channels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

LANES = 128


class Tiles(NamedTuple):
    """Rows, and most input and output channels, in a tile."""

    rows: int
    channels: int

    def of_product(self, contracted: int, output: int) -> tuple[int, int, int]:
        """As the kernel of a product takes them, no wider than the operands.

        Of output channels half as many again where they divide them: sums are written back less often. More do not fit
        into v5p's 16 MiB of VMEM.
        """
        wide = self.channels * 3 // 2
        return self.of_gradient(contracted, output) if output % wide else (self.rows, self._fit(contracted), wide)

    def of_gradient(self, contracted: int, output: int) -> tuple[int, int, int]:
        """As the kernel of the matrices' gradient takes them, whose sums are as large as a matrix's tile."""
        return self.rows, self._fit(contracted), self._fit(output)

    def _fit(self, width: int) -> int:
        return min(self.channels, -(-width // LANES) * LANES)


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
    x_MD, dy_MF = (_whole_tiles(x, tiles) for x in (x_MD, dy_MF))
    tiling = tiles.of_gradient(*w_EDF.shape[1:])
    dw_EDF = tgmm(x_MD.swapaxes(0, 1), dy_MF, group_sizes_E, w_EDF.dtype, tiling, interpret=interpret)
    return dx_MD, dw_EDF, None


grouped_matmul_tpu.defvjp(_forward, _backward)


def choose_tiles(rows: int, w_EDF: jax.Array) -> Tiles:
    """A tile is computed once for each group that has rows in it: small groups need short tiles."""
    even = rows / w_EDF.shape[0]
    return Tiles(512 if even >= 2048 else 256 if even >= 512 else 128, 1024 if w_EDF.dtype.itemsize <= 2 else 512)


def unsupported(x_MD: jax.Array) -> str | None:
    """Why the kernels, as far as they are tested, do not take these operands, or None."""
    if x_MD.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 and float32, not {x_MD.dtype}"
    return None


def _product(x_MD, w_EDF, group_sizes_E, tiles, interpret, *, transposed: bool) -> jax.Array:
    M, contracted = x_MD.shape
    tiling = tiles.of_product(contracted, w_EDF.shape[1 if transposed else 2])
    rows_MD = _whole_tiles(x_MD, tiles)
    y_MF = gmm(rows_MD, w_EDF, group_sizes_E, x_MD.dtype, tiling, transpose_rhs=transposed, interpret=interpret)[:M]
    # Nothing is written for rows beyond the last group.
    return jnp.where(jnp.arange(M)[:, None] < jnp.sum(group_sizes_E), y_MF, 0)


def _whole_tiles(x_MD: jax.Array, tiles: Tiles) -> jax.Array:
    return jnp.pad(x_MD, ((0, -x_MD.shape[0] % tiles.rows), (0, 0)))
