"""What the forward and the backward TPU kernel share: how a row is cut, and the decay factors of a chunk.

A program works on the heads of one group and walks through the row's blocks. A block is what one grid step moves;
inside it, scores are formed within chunks and the state passes from chunk to chunk. Short chunks need fewer products,
long blocks hide latency and leave fewer states behind, and the two are independent.

Per-head tables of decay factors are built once a program. Every factor is exp of a difference that is <= 0. A block
that holds a document boundary, or the end of the row, masks the tables; any other block takes them as they are.

A head may be a pack of several, ``tpu_plan.py``.

Shapes: B batch, S tokens, G heads of a program, P heads in a pack, N blocks, T tokens of a block, U chunks, C tokens of
a chunk (i and j index them), K key channels, V value channels, W = max(K, V), D heads x channels.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.tpu_plan import F32, Plan, Tiles, iota

_MARK_BITS = 16


class Tables(NamedTuple):
    """Decay factors of each head in VMEM, for a chunk without boundaries."""

    intra_GCC: Any  # token j to token i; G x P of them
    query_GCW: Any  # the entering state to token i; its last row takes the state over the whole chunk
    key_GCW: Any  # token j to the end of the chunk

    @staticmethod
    def scratch(plan: Plan) -> list[Any]:
        """Scratch shapes of the tables."""
        C, width = plan.tiles.chunk, max(plan.key, plan.value)
        intra = pltpu.VMEM((plan.heads * plan.packed, C, C), F32)
        return [intra, *[pltpu.VMEM((plan.heads, C, width), F32)] * 2]

    def fill(self, head: int, slopes: Sequence[jax.Array]) -> None:
        """Writes one head's tables."""
        C, width = self.query_GCW.shape[1:]
        i_CC, j_CC = iota((C, C), 0), iota((C, C), 1)
        for place, slope in enumerate(slopes):
            decay_CC = jnp.where(i_CC >= j_CC, _decay(slope, i_CC - j_CC), 0)
            self.intra_GCC[head * len(slopes) + place] = decay_CC
        i_CW = iota((C, width), 0)
        slope_1W = _over_lanes(slopes, width)
        self.query_GCW[head] = _decay(slope_1W, i_CW + 1)
        self.key_GCW[head] = _decay(slope_1W, C - 1 - i_CW)


class Weights(NamedTuple):
    """Decay factors of one chunk and head, zero where a boundary separates the two ends."""

    intra_CC: list[jax.Array]  # of each head in the pack
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
        slopes: Callable,
        boundaries: Boundaries | None,
        place: Place | None,
        index: int,
    ):
        """``place`` is None for a block that is full and free of boundaries."""
        C = plan.tiles.chunk
        self.index = index
        self._plan, self._tables, self._slopes = plan, tables, slopes
        self._rows = slice(index * C, (index + 1) * C)
        self._careful = place is not None
        if self._careful:
            self._length = jnp.clip(plan.length - place.block * plan.tiles.block - index * C, 0, C)
            self._first, self._last, self._same_CC = C, 0, None
            if boundaries is not None:
                self._first, self._last = boundaries.first_and_last(place.chunk + index)
                self._same_CC = iota((C, C), 0) < boundaries.ends[:, self._rows]

    def take(self, operand_TD: Any, head: int, width: int) -> jax.Array:
        """One head's rows [C, width]; zeros behind the end of the row, where memory may hold anything."""
        x_CD = operand_TD[self._rows, head * width : (head + 1) * width]
        if not (self._careful and self._plan.ragged):
            return x_CD
        return jnp.where(iota(x_CD.shape, 0) < self._length, x_CD, jnp.zeros_like(x_CD))

    def put(self, result_TD: Any, head: int, width: int, x_CD: jax.Array) -> None:
        """The inverse of ``take``."""
        result_TD[self._rows, head * width : (head + 1) * width] = x_CD.astype(result_TD.dtype)

    def weights(self, head: int) -> Weights:
        """Decay factors of one head."""
        P, (intra_GCC, *other_tables) = self._plan.packed, self._tables
        intra_CC = [intra_GCC[head * P + place] for place in range(P)]
        query_CW, key_CW = (table[head] for table in other_tables)
        carry_1W = query_CW[-1:]
        if not self._careful:
            return Weights(intra_CC, query_CW, key_CW, carry_1W)
        i_CW = iota(query_CW.shape, 0)
        if self._plan.ragged:
            slope_1W = _over_lanes(self._slopes(head), i_CW.shape[1])
            key_CW = _decay(slope_1W, self._length - 1 - i_CW)
            carry_1W = _decay(slope_1W, jnp.full(carry_1W.shape, self._length, jnp.int32))
        if self._same_CC is not None:
            intra_CC = [jnp.where(self._same_CC, x_CC, 0) for x_CC in intra_CC]
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


def _over_lanes(slopes: Sequence[jax.Array], width: int) -> jax.Array:
    """The slope of the head that owns a lane [1, width], or the only one there is."""
    if len(slopes) == 1:
        return slopes[0]
    owner_1W, slope_1W = iota((1, width), 1) // (width // len(slopes)), jnp.zeros((1, width), F32)
    for place, slope in enumerate(slopes):
        slope_1W = jnp.where(owner_1W == place, slope, slope_1W)
    return slope_1W
