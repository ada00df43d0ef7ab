"""What share of a TPU's peak megablox's kernels reach, by the compiler's static cycles: predictions.

The static profiler does not follow kernels whose grids depend on the groups. What it follows are the kernels here: they
fetch, multiply, mask and store the same tiles in the same order, over groups of one size and so over a known grid.

Shapes: M rows, E groups, D input channels, F output channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.aot import Chip, static_cycles

KERNELS = ("gmm", "tgmm")
_NAME = "tiles_of_a_grouped_product"


@dataclasses.dataclass(frozen=True)
class Call:
    """One kernel at the shape of the released model's experts, whose tiles have to divide it."""

    kernel: str  # "gmm", rows by matrices, or "tgmm", the matrices' gradient
    tiles: tuple[int, int, int]  # rows, input and output channels
    group: int = 2048  # rows
    groups: int = 1
    inputs: int = 6144
    outputs: int = 9216
    dtype: str = "bfloat16"

    def __post_init__(self):
        widths = self.group, self.inputs, self.outputs
        if any(width % tile for width, tile in zip(widths, self.tiles, strict=True)):
            raise ValueError(f"tiles {self.tiles} do not divide a group of {widths}")

    @property
    def flops(self) -> float:
        """Of its matrix products."""
        return 2.0 * self.group * self.groups * self.inputs * self.outputs

    @property
    def bytes_moved(self) -> int:
        """Bytes that the tiles' fetches and stores move."""
        rows, inputs, outputs = self.tiles
        M, D, F = self.group * self.groups, self.inputs, self.outputs
        if self.kernel == "gmm":
            moved = M * D * (F // outputs) + D * F * (M // rows) + M * F
        else:
            moved = M * D * (F // outputs) + M * F * (D // inputs) + self.groups * D * F
        return jnp.dtype(self.dtype).itemsize * moved

    def predict(self, chip: Chip, timeout: float = 600) -> float:
        """Share of the chip's peak, by cycles or by the memory where that takes longer.

        Raises:
          ProfileError: if the kernel does not compile or cannot be profiled.
        """
        # What stands for the kernels may take less than they do.
        cycles = static_cycles(chip, f"{__name__}:case", dataclasses.asdict(self), timeout, vmem_share=7 / 8)[_NAME]
        return self.flops / chip.flops / chip.seconds(cycles, self.bytes_moved)


def case(
    kernel: str, tiles: tuple[int, int, int], group: int, groups: int, inputs: int, outputs: int, dtype: str
) -> tuple[Callable, tuple[Any, ...]]:
    """The program of a ``Call``, as ``static_cycles`` takes it."""
    rows = jax.ShapeDtypeStruct((group * groups, inputs), dtype)
    if kernel == "gmm":
        others = jax.ShapeDtypeStruct((groups, inputs, outputs), dtype)
        result, make = jax.ShapeDtypeStruct((group * groups, outputs), dtype), _product
    else:
        others = jax.ShapeDtypeStruct((group * groups, outputs), dtype)
        result, make = jax.ShapeDtypeStruct((groups, inputs, outputs), dtype), _gradient
    body, grid, specs, scratch = make(tuple(tiles), group, groups, inputs, outputs)
    call = pl.pallas_call(
        body,
        out_shape=result,
        grid=grid,
        in_specs=specs[:2],
        out_specs=specs[2],
        scratch_shapes=[pltpu.VMEM(scratch, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        name=_NAME,
    )
    return call, (rows, others)


def _product(tiles, group, groups, inputs, outputs):
    tm, tk, tn = tiles
    steps = inputs // tk

    def body(x_ref, w_ref, y_ref, sum_ref):
        @pl.when(pl.program_id(2) == 0)
        def _start():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += lax.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == steps - 1)
        def _finish():
            own = _of_group(pl.program_id(1), (tm, tn), group)
            y_ref[...] = jnp.where(own, sum_ref[...], y_ref[...].astype(jnp.float32)).astype(y_ref.dtype)

    specs = (
        pl.BlockSpec((tm, tk), lambda n, m, k: (m, k)),
        pl.BlockSpec((None, tk, tn), lambda n, m, k: (m * tm // group, k, n)),
        pl.BlockSpec((tm, tn), lambda n, m, k: (m, n)),
    )
    return body, (outputs // tn, group * groups // tm, steps), specs, (tm, tn)


def _gradient(tiles, group, groups, inputs, outputs):
    tm, tk, tn = tiles
    steps = group // tm

    def body(x_ref, dy_ref, dw_ref, sum_ref):
        step = pl.program_id(2)

        @pl.when(step % steps == 0)
        def _start():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        x, dy = (
            jnp.where(_of_group(step, ref.shape, group), ref[...].astype(jnp.float32), 0.0) for ref in (x_ref, dy_ref)
        )
        x, dy = x.swapaxes(0, 1).astype(x_ref.dtype), dy.astype(dy_ref.dtype)
        sum_ref[...] += lax.dot(x, dy, preferred_element_type=jnp.float32)

        @pl.when(step % steps == steps - 1)
        def _finish():
            dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)

    specs = (
        pl.BlockSpec((tm, tk), lambda n, k, m: (m, k)),
        pl.BlockSpec((tm, tn), lambda n, k, m: (m, n)),
        pl.BlockSpec((None, tk, tn), lambda n, k, m: (m // steps, k, n)),
    )
    return body, (outputs // tn, inputs // tk, groups * steps), specs, (tk, tn)


def _of_group(tile: jax.Array, shape: tuple[int, int], group: int) -> jax.Array:
    """Which rows of a tile belong to its group."""
    start = tile * shape[0] // group * group
    row = lax.broadcasted_iota(jnp.int32, shape, 0) + tile * shape[0]
    return (row >= start) & (row < start + group)
