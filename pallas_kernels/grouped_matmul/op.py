"""Product of rows, sorted by group, with their group's matrix: the expert layers' work. And the choice of its form.

Shapes: M rows, E groups, D input channels, F output channels.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.blocked import Blocks, grouped_matmul_blocked
from pallas_kernels.grouped_matmul.padded import grouped_matmul_padded, most_blocks
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu, unsupported
from pallas_kernels.grouped_matmul.tpu_tiles import choose_tiles
from pallas_kernels.platform import no_tpu_kernel_here, say_once, target_platform

IMPLEMENTATIONS = ("auto", "reference", "blocked", "padded", "ragged", "tpu", "tpu_interpret")

# Memory that nobody wrote reads as NaN.
_INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan")

# Rows in a small block of the blocked form, and the most in a large one, by target platform.
_BLOCKS = {"cpu": (64, 512), "gpu": (256, 2048), "tpu": (256, 2048)}
# Most rows in a block of the padded form.
_PADDED_BLOCK = 4096
# Bytes that the padded form's copies of the matrices may take.
_PADDED_BYTES = 2**32


def grouped_matmul(
    x_MD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """``y[m] = x[m] @ w[e]`` for the group e that row m lies in; rows beyond the last group give zero.

    Args:
      x_MD: rows, those of group 0 first.
      w_EDF: one matrix a group.
      group_sizes_E: int32 rows in each group; their sum is at most M.
      implementation: "auto", or one of ``IMPLEMENTATIONS`` to force it. "tpu" is the megablox kernels, the choice where
        the code is traced for TPU; "ragged" is ``lax.ragged_dot``, which has kernels on TPU too and is the choice where
        megablox does not take the call (the log says why once), and expands densely elsewhere; "padded" is the choice
        for GPUs while its copies of the matrices fit into 4 GiB; "blocked" copies none and is the choice otherwise.
        "tpu_interpret" simulates the TPU kernels on a CPU.

    Returns:
      y [M, F] in x's dtype, accumulated in fp32 or wider.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation is unknown.
      NotImplementedError: if a forced implementation cannot run, with the reason.
    """
    (M, D), E = x_MD.shape, group_sizes_E.shape[0]
    if w_EDF.ndim != 3 or w_EDF.shape[:2] != (E, D) or x_MD.dtype != w_EDF.dtype:
        raise ValueError(
            f"x {x_MD.shape} {x_MD.dtype} and w {w_EDF.shape} {w_EDF.dtype} do not fit {E} groups: need [M, D] and "
            "[E, D, F] of one dtype"
        )
    if implementation == "auto":
        implementation = _choose(x_MD, w_EDF)
    if implementation == "reference":
        return grouped_matmul_reference(x_MD, w_EDF, group_sizes_E)
    if implementation == "blocked":
        return grouped_matmul_blocked(x_MD, w_EDF, group_sizes_E, _blocks(M, E))
    if implementation == "padded":
        return grouped_matmul_padded(x_MD, w_EDF, group_sizes_E, _padded_block(M, E))
    if implementation == "ragged":
        wide = jnp.promote_types(jnp.float32, x_MD.dtype)
        return lax.ragged_dot(x_MD, w_EDF, group_sizes_E, preferred_element_type=wide).astype(x_MD.dtype)
    if implementation in ("tpu", "tpu_interpret"):
        interpret = _INTERPRET if implementation == "tpu_interpret" else False
        reason = unsupported(x_MD) or (None if interpret else no_tpu_kernel_here())
        if reason is not None:
            raise NotImplementedError(f"implementation={implementation!r} cannot run: {reason}")
        return grouped_matmul_tpu(x_MD, w_EDF, group_sizes_E, choose_tiles(M, E, str(x_MD.dtype)), interpret)
    raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")


def _choose(x_MD: jax.Array, w_EDF: jax.Array) -> str:
    platform = target_platform()
    if platform == "tpu":
        reason = unsupported(x_MD) or no_tpu_kernel_here()
        if reason is None:
            return "tpu"
        say_once(f"the experts' product takes lax.ragged_dot, not the TPU kernels: {reason}")
        return "ragged"
    rows, E = x_MD.shape[0], w_EDF.shape[0]
    copies = most_blocks(rows, E, _padded_block(rows, E))
    fits = copies * (w_EDF.size // E) * w_EDF.dtype.itemsize <= _PADDED_BYTES
    return "padded" if platform == "gpu" and fits else "blocked"


def _blocks(rows: int, groups: int) -> Blocks:
    """A group of average size has about one large block, or several of the largest size."""
    small, most = (min(size, rows) for size in _BLOCKS[target_platform()])
    even = 2 ** math.floor(math.log2(max(rows / groups, 1)))
    return Blocks(max(small, min(even, most)), small)


def _padded_block(rows: int, groups: int) -> int:
    """About half a group of average size: smaller ones pad less but copy matrices more often."""
    return max(1, min(_PADDED_BLOCK, 2 ** math.floor(math.log2(max(rows / (2 * groups), 1)))))
