"""What the TPU kernels take, and the sizes they run with: a table by device kind, dtype and head size.

``python -m pallas_kernels.tune`` fills the table, ``tpu_tiles.json``, which also says what compiler its figures are of.
Shapes: B batch, S tokens, H heads, K key channels, V value channels.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels.lightning_attention.tpu_plan import Plan, Tiles, vmem_bytes
from pallas_kernels.platform import one_spelling, target_device_kind
from pallas_kernels.size_table import read_rows

TABLE = Path(__file__).with_name("tpu_tiles.json")
LANES = 128
# Where the table says nothing.
DEFAULT = Tiles(block=512, chunk=128, heads=4, lag=2, fused=False)
# Kinds of device whose parallel programs run on two cores.
_TWO_CORES = ("TPU v4", "TPU v5")
# What a kernel's blocks may take of VMEM, of which v4 lets a kernel have 16 MiB and the others far more.
_VMEM_BYTES = {"TPU v4": 8 * 2**20}
_MOST_VMEM_BYTES = 48 * 2**20
# A mark a chunk lies in scalar memory, which holds 1 MiB on the smallest chip.
_MOST_TOKENS = 2**22


def unsupported(q_BSHK: jax.Array, v_BSHV: jax.Array) -> str | None:
    """Why the kernels, as far as they are tested, do not take these operands, or None."""
    (B, S, _, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    if q_BSHK.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernels take bfloat16 and float32, not {q_BSHK.dtype}"
    if max(K, V) > 256:
        return f"the TPU kernels take heads of up to 256 channels, not K={K} and V={V}"
    if B * S > _MOST_TOKENS:
        return f"the TPU kernels take up to {_MOST_TOKENS:,} tokens a device, not {B * S:,}"
    return None


def choose_tiles(q_BSHK: jax.Array, v_BSHV: jax.Array, kind: str | None = None) -> tuple[Tiles, Tiles]:
    """Sizes of the forward and the backward kernel for these operands.

    Args:
      kind: of device; None takes the one that the code is traced for.
    """
    (B, S, H, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    P = packed(H, K, V)
    H, K, V = H // P, K * P, V * P
    kind = target_device_kind() if kind is None else one_spelling(kind)
    key, value = padded(K), padded(V)
    pair = _table().get((kind, str(q_BSHK.dtype), key, value), (DEFAULT, DEFAULT))
    most_heads = H // 2 if kind in _TWO_CORES and B == 1 and H > 1 else H
    pair = [dataclasses.replace(tiles, heads=min(tiles.heads, most_heads)) for tiles in pair]
    block = min(tiles.block for tiles in pair)
    while True:
        # Both kernels share the blocks: the states at their edges pass from one to the other.
        pair = [_fit(dataclasses.replace(tiles, block=block), S) for tiles in pair]
        plans = [Plan(tiles, S, tiles.heads, key, value, q_BSHK.dtype, True, False, P) for tiles in pair]
        if vmem_bytes(plans[1], (key, key, value, value), (key, key, value)) <= _VMEM_BYTES.get(kind, _MOST_VMEM_BYTES):
            return pair[0], pair[1]
        if block > max(tiles.chunk for tiles in pair):
            block //= 2
        elif max(tiles.heads for tiles in pair) > 1:
            pair = [dataclasses.replace(tiles, heads=max(1, tiles.heads // 2)) for tiles in pair]
        else:
            return pair[0], pair[1]


def packed(heads: int, key: int, value: int) -> int:
    """How many heads the kernels take side by side as one: two of 64 channels, which would fill half of the lanes."""
    return 2 if key == value == LANES // 2 and heads % 2 == 0 else 1


def padded(channels: int) -> int:
    """Channels in whole lanes, as the kernels see them."""
    return -(-channels // LANES) * LANES


def _fit(tiles: Tiles, length: int) -> Tiles:
    """A block no longer than the row needs."""
    chunks = -(-length // tiles.chunk)
    return dataclasses.replace(tiles, block=min(tiles.block, chunks * tiles.chunk))


@functools.cache
def _table() -> dict[tuple[str, str, int, int], tuple[Tiles, Tiles]]:
    return {
        (row["device"], row["dtype"], row["key"], row["value"]): (Tiles(**row["forward"]), Tiles(**row["backward"]))
        for row in read_rows(TABLE)
    }
