"""What is static about a call of the forward or the backward TPU kernel: its sizes, and how a pack of heads is taken.

Heads of 64 channels go in pairs, side by side in the lanes of one of 128: their states are the blocks on the diagonal
of one matrix, their scores stay apart. A head is such a pack wherever nothing else is said.

Shapes: ``tpu_block.py``; P heads in a pack.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes that a kernel is compiled with; the table in ``tpu_tiles.py`` has the good ones."""

    block: int  # T, a multiple of the chunk
    chunk: int  # C, a multiple of 128
    heads: int  # most heads of a program
    lag: int  # items between the stages of the software pipeline
    fused: bool  # [scores, queries] @ [values; state] as one product, which fills a matrix unit 256 deep


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    tiles: Tiles
    length: int  # real tokens of a row
    heads: int  # G, divides the row's heads
    key: int  # K and V, multiples of 128
    value: int
    dtype: Any  # of q, k and v
    segmented: bool
    interpret: Any  # what pallas_call takes
    packed: int = 1  # P

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.length // self.tiles.block)

    @property
    def chunks(self) -> int:
        """Chunks of a block."""
        return self.tiles.block // self.tiles.chunk

    @property
    def ragged(self) -> bool:
        """Whether the last block reaches over the end of the row."""
        return self.length % self.tiles.block != 0

    def tokens(self, width: int, order: Callable) -> pl.BlockSpec:
        """Blocks of an operand [B, S, H x width]; ``order`` maps the grid's step to a block."""
        return pl.BlockSpec((None, self.tiles.block, self.heads * width), lambda b, g, n, *_: (b, order(n), g))

    def states(self, order: Callable) -> pl.BlockSpec:
        """Blocks of the states [B, N, H, K, V]."""
        shape = (None, None, self.heads, self.key, self.value)
        return pl.BlockSpec(shape, lambda b, g, n, *_: (b, order(n), g, 0, 0))

    def state(self) -> pl.BlockSpec:
        """The block of a state [B, H, K, V]."""
        return pl.BlockSpec((None, self.heads, self.key, self.value), lambda b, g, n, *_: (b, g, 0, 0))

    def ends(self, order: Callable) -> list[pl.BlockSpec]:
        """Blocks of ``Boundaries.ends``."""
        if not self.segmented:
            return []
        return [pl.BlockSpec((None, 1, self.tiles.block), lambda b, g, n, *_: (b, 0, order(n)))]

    def dot(self, left: jax.Array, right: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
        """Matrix product accumulated in fp32; fp32 operands keep their precision."""
        precision = lax.Precision.HIGHEST if self.dtype == F32 else None
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=F32)

    def dots(self, left_CC: Sequence[jax.Array], right_CD: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
        """Sum over the heads of a pack of a matrix of each times its part of an operand."""
        products = [
            self.dot(x_CC, own_CD, contract) for x_CC, own_CD in zip(left_CC, self.apart(right_CD), strict=True)
        ]
        return functools.reduce(jnp.add, products)

    def slopes(self, slopes_H: Any, first_head: jax.Array) -> Callable[[int], list[jax.Array]]:
        """What gives the slopes of a pack, counted from the program's first."""
        return lambda head: [slopes_H[(first_head + head) * self.packed + place] for place in range(self.packed)]

    def apart(self, x_CD: jax.Array) -> list[jax.Array]:
        """For each head of a pack its operand, zero in the lanes of the others."""
        if self.packed == 1:
            return [x_CD]
        owner_CD = iota(x_CD.shape, 1) // (x_CD.shape[1] // self.packed)
        return [jnp.where(owner_CD == place, x_CD, jnp.zeros_like(x_CD)) for place in range(self.packed)]

    def diagonal(self, state_KV: jax.Array) -> jax.Array:
        """A product of keys and values without what two heads of a pack have in common."""
        if self.packed == 1:
            return state_KV
        (K, V), P = state_KV.shape, self.packed
        own_KV = iota((K, V), 0) // (K // P) == iota((K, V), 1) // (V // P)
        return jnp.where(own_KV, state_KV, 0.0)

    def flops(self, tokens_and_heads: int, backward: bool) -> int:
        """Floating-point operations of a whole call."""
        C, K, V = self.tiles.chunk, self.key, self.value
        products = 3 * C * K + 2 * C * V + 5 * K * V if backward else C * K + C * V + 2 * K * V
        return 2 * products * tokens_and_heads

    def call(self, operands: Sequence[int], results: Sequence[int], flops: int) -> dict[str, Any]:
        """The arguments of ``pallas_call`` that do not depend on the kernel's operands."""
        return {
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=vmem_bytes(self, operands, results),
            ),
            "interpret": self.interpret,
        }


def vmem_bytes(plan: Plan, operands: Sequence[int], results: Sequence[int]) -> int:
    """An upper bound of what a kernel with these widths of operands and results takes in VMEM."""
    T, C, G, K, V = plan.tiles.block, plan.tiles.chunk, plan.heads, plan.key, plan.value
    itemsize = jnp.dtype(plan.dtype).itemsize
    # Two copies of each block: one is worked on while the other moves.
    tokens = 2 * T * G * (sum(operands) + sum(results)) * itemsize
    states = 4 * G * K * V * (2 * 3 + 1 + plan.chunks)
    tables = 4 * G * C * (plan.packed * C + 2 * max(K, V))
    return tokens + states + tables + 16 * 2**20


def iota(shape: tuple[int, ...], dimension: int) -> jax.Array:
    """int32 indices along a dimension."""
    return lax.broadcasted_iota(jnp.int32, shape, dimension)
