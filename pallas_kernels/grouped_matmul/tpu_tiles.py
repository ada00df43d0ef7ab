"""Sizes of the tiles that megablox's kernels work in, chosen from a table by device kind and dtype.

The table, ``tpu_tiles.json``, says what share of the chip's peak a product (gmm) and the gradient of the matrices
(tgmm) reach with some tiles; ``python -m pallas_kernels.tune --kernels=grouped`` fills it. A tile is computed once for
each group that has rows in it, so that tall ones reach more but compute more twice: the choice weighs both.

Shapes: M rows sorted by group, E groups, D input channels, F output channels.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.platform import one_spelling, target_device_kind
from pallas_kernels.size_table import read_rows

TABLE = Path(__file__).with_name("tpu_tiles.json")
LANES = 128
# Most output channels of a tile that need not divide the operand's: what is left over is masked.
_ANY = 1024
# Where the table says nothing: rows of a tile and, about as on v5p, what share they reach.
_DEFAULT_SHARES = {512: 0.84, 256: 0.81, 128: 0.7}


class Tile(NamedTuple):
    """Rows, input and output channels."""

    rows: int
    inputs: int
    outputs: int

    def within(self, inputs: int, outputs: int) -> "Tile":
        """No wider than the operands; of more than ``_ANY`` output channels only where those divide them."""
        wide = self.outputs if outputs % self.outputs == 0 else min(self.outputs, _ANY)
        return Tile(self.rows, _fit(self.inputs, inputs), _fit(wide, outputs))


class Tiles(NamedTuple):
    """Of a product of rows and matrices, forward and for the gradient of the rows, and of the matrices' gradient."""

    product: Tile
    gradient: Tile


class Counted(NamedTuple):
    """A tile and the share of the peak that a kernel reaches with it."""

    tile: Tile
    share: float

    def net_share(self, rows: int, groups: int) -> float:
        """Without what is padding and what is computed twice: a tile for each group but the first."""
        tiles = max(1, -(-rows // self.tile.rows)) + groups - 1
        return self.share * max(1, rows) / (tiles * self.tile.rows)


def choose_tiles(rows: int, groups: int, dtype: str, kind: str | None = None) -> Tiles:
    """Tiles for operands of so many rows and groups.

    Args:
      kind: of device; None takes the one that the code is traced for.
    """
    kind = target_device_kind() if kind is None else one_spelling(kind)
    product, gradient = (_fastest(kind, dtype, kernel, rows, groups).tile for kernel in ("gmm", "tgmm"))
    return Tiles(product, gradient)


def share_of_peak(kind: str, kernel: str, rows: int, groups: int) -> float | None:
    """What "gmm" or "tgmm" reaches by the table in bf16, or None for a kind of device that was not counted."""
    if (kind, "bfloat16") not in _table():
        return None
    return _fastest(kind, "bfloat16", kernel, rows, groups).net_share(rows, groups)


def _fastest(kind: str | None, dtype: str, kernel: str, rows: int, groups: int) -> Counted:
    counted = _table().get((kind, dtype), {}).get(kernel) or _default(dtype)
    return max(counted, key=lambda row: row.net_share(rows, groups))


def _default(dtype: str) -> list[Counted]:
    channels = _ANY if dtype == "bfloat16" else _ANY // 2
    return [Counted(Tile(rows, channels, channels), share) for rows, share in _DEFAULT_SHARES.items()]


def _fit(size: int, width: int) -> int:
    return min(size, -(-width // LANES) * LANES)


@functools.cache
def _table() -> dict[tuple[str, str], dict[str, list[Counted]]]:
    return {
        (row["device"], row["dtype"]): {
            kernel: [Counted(Tile(*tile), share) for *tile, share in row[kernel]] for kernel in ("gmm", "tgmm")
        }
        for row in read_rows(TABLE)
    }
