"""Sizes of the blocks that splash attention's kernels work in, chosen from a table by device kind, dtype and head size.

The table, ``tpu_blocks.json``, says what share of the chip's peak each kernel reaches with some sizes, on the pairs of
blocks that it computes. Larger blocks reach more, but compute more pairs above the diagonal for nothing: the choice
weighs both for the length of the row. ``python -m pallas_kernels.tune --kernels=softmax`` fills the table, which also
says what compiler its figures are of.

Shapes: B batch, S tokens, H query heads, G key-value heads, K key channels, V value channels.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

from pallas_kernels.platform import one_spelling, target_device_kind
from pallas_kernels.size_table import read_rows
from pallas_kernels.softmax_attention.tpu_tables import SCALAR_BYTES, TABLE_BYTES

TABLE = Path(__file__).with_name("tpu_blocks.json")
LANES = 128
# Matrix products of each kernel, 2 K FLOPs a pair and head. The backward pass is "dq" and "dkv", or all in one.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}
_PASSES = (("fwd", "fused"), ("fwd", "dq", "dkv"))
# The kernel of all gradients leaves a share of dq in memory for each block of keys: at most so many times q's size.
_MOST_SHARES = 8


class Sizes(NamedTuple):
    """Of one kernel's blocks, in tokens: powers of two from 128."""

    queries: int
    keys: int
    compute: int  # keys at a time; dq takes a whole block

    @property
    def largest(self) -> int:
        """What a row has to be a multiple of."""
        return max(self.queries, self.keys)

    def within(self, most: int) -> "Sizes":
        """None of them above ``most``."""
        return Sizes(*(min(size, most) for size in self))

    def causal_pairs(self, length: int) -> int:
        """Pairs of a query and a key that are computed of a row that is one document."""
        ends = range(self.queries, length + 1, self.queries)
        return self.queries * self.keys * sum(-(-end // self.keys) for end in ends)

    def table_bytes(self, length: int) -> int:
        """Scalar memory that the tables of a row take."""
        return length // self.queries * (length // self.keys) * TABLE_BYTES


class Counted(NamedTuple):
    """Sizes and the share of the peak that a kernel reaches with them."""

    sizes: Sizes
    share: float

    def time(self, length: int, whole_row: bool) -> float:
        """Of a product over a causal row, or over all pairs of two parts, in no unit."""
        return (self.sizes.causal_pairs(length) if whole_row else length**2) / self.share


# Where the table says nothing: the largest that fit into 16 MiB of VMEM, which every chip gives a kernel by default.
_DEFAULT, _WIDE_DEFAULT = Sizes(1024, 2048, 512), Sizes(512, 1024, 512)


def choose_blocks(q_BSHK: jax.Array, v_BSGV: jax.Array, kind: str | None = None, whole_row: bool = True) -> BlockSizes:
    """Sizes for these operands.

    Args:
      kind: of device; None takes the one that the code is traced for.
      whole_row: whether what is computed above the diagonal is lost. Of a ring's steps only the first has a diagonal.
    """
    S, channels = q_BSHK.shape[1], max(q_BSHK.shape[-1], v_BSGV.shape[-1])
    kind = target_device_kind() if kind is None else one_spelling(kind)
    chosen = _choose(kind, str(q_BSHK.dtype), channels, S, whole_row)
    sizes = {kernel: row.sizes for kernel, row in chosen.items()}
    if "fused" in sizes:
        return BlockSizes(*sizes["fwd"], *sizes["fused"], use_fused_bwd_kernel=True)
    return BlockSizes(*sizes["fwd"], *sizes["dkv"], sizes["dq"].queries, sizes["dq"].keys)


def share_of_peak(kind: str, kernel: str, length: int, whole_row: bool) -> float | None:
    """What a kernel reaches by the table, bf16 and 128 channels; None for a kind of device that was not counted.

    Args:
      kernel: one of ``PRODUCTS``.
      length: tokens of the row, or of the part of it that a step of a ring takes.
      whole_row: as of ``choose_blocks``.
    """
    rows = _table().get((kind, "bfloat16", LANES))
    if rows is None:
        return None
    chosen = _choose(kind, "bfloat16", LANES, length, whole_row)
    largest = max(row.sizes.largest for row in chosen.values())
    padded = _padded(length, largest)
    # Other dtypes and head sizes may run kernels that were not chosen here.
    others = (Counted(row.sizes.within(largest), row.share) for row in rows[kernel])
    sizes, share = chosen.get(kernel) or min(others, key=lambda row: row.time(padded, whole_row))
    return share * length * (length + 1) / 2 / sizes.causal_pairs(padded) if whole_row else share


@functools.cache
def _choose(kind: str | None, dtype: str, channels: int, length: int, whole_row: bool) -> dict[str, Counted]:
    """For the kernels of the fastest passes. Rows are padded to a multiple of the largest block, which they share."""
    default = _DEFAULT if dtype == "bfloat16" and channels <= LANES else _WIDE_DEFAULT
    rows = _table().get((kind, dtype, channels)) or {kernel: [Counted(default, 1.0)] for kernel in _PASSES[-1]}
    # No longer than the row: a power of two, so that the smaller divides the larger.
    most = max(LANES, 1 << (length - 1).bit_length())
    rows = {kernel: [Counted(row.sizes.within(most), row.share) for row in of] for kernel, of in rows.items()}
    choices = []
    for largest in sorted({row.sizes.largest for counted in rows.values() for row in counted}):
        padded = _padded(length, largest)
        picks = {kernel: _fastest(kernel, of, largest, padded, whole_row) for kernel, of in rows.items()}
        for kernels in _PASSES:
            chosen = {kernel: picks.get(kernel) for kernel in kernels}
            if None not in chosen.values():
                # What fits comes first: a row can be cut into pieces, a part of a ring cannot.
                fit = all(row.sizes.table_bytes(padded) <= SCALAR_BYTES for row in chosen.values())
                time = sum(PRODUCTS[kernel] * row.time(padded, whole_row) for kernel, row in chosen.items())
                choices.append((not fit, time, chosen))
    return min(choices, key=lambda choice: choice[:2])[-1]


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _fastest(kernel: str, rows: Sequence[Counted], largest: int, length: int, whole_row: bool) -> Counted | None:
    rows = [row for row in rows if row.sizes.largest <= largest]
    if kernel == "fused":
        rows = [row for row in rows if length // row.sizes.keys <= _MOST_SHARES]
    rows = [row for row in rows if row.sizes.table_bytes(length) <= SCALAR_BYTES] or rows
    return min(rows, key=lambda row: row.time(length, whole_row), default=None)


@functools.cache
def _table() -> dict[tuple[str, str, int], dict[str, list[Counted]]]:
    return {
        (row["device"], row["dtype"], row["channels"]): {
            kernel: [Counted(Sizes(*sizes), share) for *sizes, share in row[kernel]] for kernel in PRODUCTS
        }
        for row in read_rows(TABLE)
    }
