"""What the forward and the backward TPU kernel share: how a row is cut, and the decay factors of a chunk.

A program works on the heads of one group and walks through the row's blocks. A block is what one grid step moves;
inside it, scores are formed within chunks and the state passes from chunk to chunk. Short chunks need fewer products,
long blocks hide latency and leave fewer states behind, and the two are independent.

Per-head tables of decay factors are built once a program. Every factor is exp of a difference that is <= 0. A block
that holds a document boundary, or the end of the row, masks the tables; any other block takes them as they are.

Shapes: B batch, S tokens, G heads of a program, N blocks, T tokens of a block, U chunks, C tokens of a chunk (i and j
index them), K key channels, V value channels, W = max(K, V), D heads x channels.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

F32 = jnp.float32
_MARK_BITS = 16


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
    tables = 4 * G * C * (C + 2 * max(K, V))
    return tokens + states + tables + 16 * 2**20


class Tables(NamedTuple):
    """Decay factors of each head in VMEM, for a chunk without boundaries."""

    intra_GCC: Any  # token j to token i
    query_GCW: Any  # the entering state to token i; its last row takes the state over the whole chunk
    key_GCW: Any  # token j to the end of the chunk

    @staticmethod
    def scratch(plan: Plan) -> list[Any]:
        """Scratch shapes of the tables."""
        C, width = plan.tiles.chunk, max(plan.key, plan.value)
        return [pltpu.VMEM((plan.heads, C, lanes), F32) for lanes in (C, width, width)]

    def fill(self, head: int, slope: jax.Array) -> None:
        """Writes one head's tables."""
        C, width = self.query_GCW.shape[1:]
        i_CC, j_CC = _iota((C, C), 0), _iota((C, C), 1)
        self.intra_GCC[head] = jnp.where(i_CC >= j_CC, _decay(slope, i_CC - j_CC), 0)
        i_CW = _iota((C, width), 0)
        self.query_GCW[head] = _decay(slope, i_CW + 1)
        self.key_GCW[head] = _decay(slope, C - 1 - i_CW)


class Weights(NamedTuple):
    """Decay factors of one chunk and head, zero where a boundary separates the two ends."""

    intra_CC: jax.Array
    query_CW: jax.Array
    key_CW: jax.Array
    carry_1W: jax.Array  # the entering state to the leaving one

    @staticmethod
    def scale(x_CD: jax.Array, factor_CW: jax.Array) -> jax.Array:
        """One head's operand times a factor, in the operand's dtype."""
        return (x_CD.astype(F32) * factor_CW[:, : x_CD.shape[1]]).astype(x_CD.dtype)


class Boundaries(NamedTuple):
    """Where documents begin. Positions count from the start of a chunk, and C stands for one behind it.

    As arrays of a whole call: marks [B x N x U], ends [B, 1, N x T]; in a kernel: all marks, which are prefetched
    scalars, and a block of ends.
    """

    marks: Any  # first and last document start of each chunk (C and 0 if none), packed
    ends: Any  # end of each token's document

    @classmethod
    def of(cls, starts_BS: jax.Array, tiles: Tiles) -> "Boundaries":
        """From the first tokens of documents, bool [B, S]."""
        B, S = starts_BS.shape
        C, padding = tiles.chunk, -S % tiles.block
        starts_BUC = jnp.pad(starts_BS, ((0, 0), (0, padding))).reshape(B, -1, C)
        index_C = jnp.arange(C, dtype=jnp.int32)
        place_BUC = jnp.where(starts_BUC, index_C, C)
        first_BU, last_BU = jnp.min(place_BUC, axis=2), jnp.max(jnp.where(starts_BUC, index_C, 0), axis=2)
        # Not a cumulative minimum: over a million tokens that alone took the compiler 40 seconds.
        later_CC = index_C[None, :] > index_C[:, None]
        ends_BUC = jnp.min(jnp.where(later_CC, place_BUC[:, :, None, :], C), axis=3)
        return cls((first_BU << _MARK_BITS | last_BU).reshape(-1), ends_BUC.reshape(B, 1, -1))

    @classmethod
    def split(cls, plan: Plan, refs: Sequence[Any]) -> tuple["Boundaries | None", Sequence[Any]]:
        """A kernel's references to these, if it has them, and its other references."""
        return (cls(*refs[:2]), refs[2:]) if plan.segmented else (None, refs)

    def first_and_last(self, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Unpacks the mark of one chunk, counted over all rows."""
        mark = self.marks[chunk]
        return mark >> _MARK_BITS, mark & (2**_MARK_BITS - 1)


class Place(NamedTuple):
    """Where a program is: a block, and the first chunk of the block counted over all rows."""

    block: jax.Array
    chunk: jax.Array

    @classmethod
    def of(cls, plan: Plan, block: jax.Array) -> "Place":
        """For block ``block`` of the program's row."""
        return cls(block, (pl.program_id(0) * plan.blocks + block) * plan.chunks)


class Chunk:
    """One chunk of a block: its rows of the operands, and its decay factors."""

    def __init__(
        self,
        plan: Plan,
        tables: Tables,
        slope: Callable,
        boundaries: Boundaries | None,
        place: Place | None,
        index: int,
    ):
        """``place`` is None for a block that is full and free of boundaries."""
        C = plan.tiles.chunk
        self.index = index
        self._plan, self._tables, self._slope = plan, tables, slope
        self._rows = slice(index * C, (index + 1) * C)
        self._careful = place is not None
        if self._careful:
            self._length = jnp.clip(plan.length - place.block * plan.tiles.block - index * C, 0, C)
            self._first, self._last, self._same_CC = C, 0, None
            if boundaries is not None:
                self._first, self._last = boundaries.first_and_last(place.chunk + index)
                self._same_CC = _iota((C, C), 0) < boundaries.ends[:, self._rows]

    def take(self, operand_TD: Any, head: int, width: int) -> jax.Array:
        """One head's rows [C, width]; zeros behind the end of the row, where memory may hold anything."""
        x_CD = operand_TD[self._rows, head * width : (head + 1) * width]
        if not (self._careful and self._plan.ragged):
            return x_CD
        return jnp.where(_iota(x_CD.shape, 0) < self._length, x_CD, jnp.zeros_like(x_CD))

    def put(self, result_TD: Any, head: int, width: int, x_CD: jax.Array) -> None:
        """The inverse of ``take``."""
        result_TD[self._rows, head * width : (head + 1) * width] = x_CD.astype(result_TD.dtype)

    def weights(self, head: int) -> Weights:
        """Decay factors of one head."""
        intra_CC, query_CW, key_CW = (table[head] for table in self._tables)
        carry_1W = query_CW[-1:]
        if not self._careful:
            return Weights(intra_CC, query_CW, key_CW, carry_1W)
        i_CW = _iota(query_CW.shape, 0)
        if self._plan.ragged:
            key_CW = _decay(self._slope(head), self._length - 1 - i_CW)
            carry_1W = _decay(self._slope(head), jnp.full(carry_1W.shape, self._length, jnp.int32))
        if self._same_CC is not None:
            intra_CC = jnp.where(self._same_CC, intra_CC, 0)
            query_CW = jnp.where(i_CW < self._first, query_CW, 0)
            key_CW = jnp.where(i_CW >= self._last, key_CW, 0)
            carry_1W = jnp.where(self._first == self._plan.tiles.chunk, carry_1W, 0)
        return Weights(intra_CC, query_CW, key_CW, carry_1W)


def for_block(plan: Plan, block: jax.Array, boundaries: Boundaries | None, work: Callable) -> None:
    """Runs ``work(place)`` for a block, as ``Chunk`` takes ``place``."""
    if not (plan.ragged or plan.segmented):
        work(None)
        return
    place = Place.of(plan, block)
    plain = block < plan.blocks - 1 if plan.ragged else block >= 0
    if boundaries is not None:
        for chunk in range(plan.chunks):
            plain &= boundaries.first_and_last(place.chunk + chunk)[0] == plan.tiles.chunk
    pl.when(plain)(lambda: work(None))
    pl.when(jnp.logical_not(plain))(lambda: work(place))


def interleave(items: Sequence[Iterator[None]], stages: int, lag: int) -> None:
    """Traces the stages of pieces of work in the order of a software pipeline.

    A matrix unit takes its products in program order, so a product that waits for another one's result holds up all
    that follow. Each generator yields between its stages; stage s of item i is traced at time i + s * lag, and the same
    stage of all items in their order.
    """
    for _, _, item in sorted((i + s * lag, -s, i) for i in range(len(items)) for s in range(stages)):
        next(items[item], None)


def _decay(slope: jax.Array, distance: jax.Array) -> jax.Array:
    return jnp.exp(-slope * jnp.maximum(distance, 0).astype(F32))


def _iota(shape: tuple[int, ...], dimension: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, dimension)
