"""What share of a TPU's peak splash attention's kernels reach: by the compiler's static cycles, or on the chip here.

The static profiler does not follow grids that depend on tables. Without any, the same kernels compute every pair of
blocks, with the masks for order and documents in each. So what is counted is the work on blocks that are computed, not
the turns of the grid that pass over others.

Shapes: S tokens, H query heads, G key-value heads, K channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pallas_kernels.aot import Chip, static_cycles
from pallas_kernels.softmax_attention.tpu_blocks import PRODUCTS, Sizes
from pallas_kernels.softmax_attention.tpu_kernels import Kernels
from pallas_kernels.timing import median_seconds

_HEADS = 2
# Of the VMEM that there is: compilers differ by up to 2.7 MiB, and a real call has tables besides.
_VMEM_SHARE = 3 / 4


@dataclasses.dataclass(frozen=True)
class Call:
    """One kernel, over every pair of a row of two heads: one for each core of a chip that has two."""

    kernel: str  # one of ``PRODUCTS``
    sizes: Sizes
    tokens: int = 8192
    channels: int = 128
    dtype: str = "bfloat16"

    @property
    def flops(self) -> float:
        """Of its matrix products."""
        return PRODUCTS[self.kernel] * 2.0 * self.channels * _HEADS * self.tokens**2

    def cycles(self, chip: Chip, timeout: float = 600) -> int:
        """The compiler's static count for a call.

        Raises:
          ProfileError: if the kernel does not compile or cannot be profiled.
        """
        arguments = dataclasses.asdict(self)
        cycles = static_cycles(chip, f"{__name__}:case", arguments, timeout, vmem_share=_VMEM_SHARE)
        name = "dkv" if self.kernel == "fused" else self.kernel
        return next(count for kernel, count in cycles.items() if f"_{name}_" in kernel)

    def predict(self, chip: Chip) -> float:
        """Share of the chip's peak, by the compiler's cycles.

        Raises:
          ProfileError: if the kernel does not compile or cannot be profiled.
        """
        return self.flops / chip.flops / (self.cycles(chip) / chip.clock)

    def measure(self, chip: Chip, repetitions: int = 10) -> float:
        """Share of the chip's peak on the TPU that is here, by the median of several calls."""
        function, shapes = case(**dataclasses.asdict(self))
        arguments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        limit = {"xla_tpu_scoped_vmem_limit_kib": str(int(_VMEM_SHARE * chip.vmem / 1024))}
        compiled = jax.jit(function).lower(*arguments).compile(limit)
        return self.flops / chip.flops / median_seconds(lambda: compiled(*arguments), repetitions)


def case(
    kernel: str, sizes: tuple[int, int, int], tokens: int, channels: int, dtype: str
) -> tuple[Callable, tuple[Any, ...]]:
    """The program of a ``Call``, as ``static_cycles`` takes it."""
    row = jax.ShapeDtypeStruct((_HEADS, tokens, channels), dtype)
    sums = jax.ShapeDtypeStruct((_HEADS, tokens), jnp.float32)
    fused = kernel == "fused"
    of_queries = (None, None) if fused else sizes[:2]
    kernels = Kernels(BlockSizes(*sizes, *sizes, *of_queries, use_fused_bwd_kernel=fused), interpret=False)

    def run(q_HSK, do_HSK, lse_HS, delta_HS, k_GSK, v_GSK, ids_S):
        segment_ids = SegmentIds(ids_S, ids_S)
        every_pair = MaskInfo(None, None, None, None, jnp.arange(tokens, dtype=jnp.int32))
        if kernel == "fwd":
            return kernels.forward(q_HSK, k_GSK, v_GSK, segment_ids, every_pair)
        of_queries, of_keys = (q_HSK, do_HSK, lse_HS, delta_HS), (k_GSK, v_GSK)
        dq, *dkv = kernels.backward(of_queries, of_keys, segment_ids, every_pair, every_pair)
        return {"dq": dq, "dkv": dkv, "fused": (dq, dkv)}[kernel]

    return run, (row, row, sums, sums, row, row, jax.ShapeDtypeStruct((tokens,), jnp.int32))
