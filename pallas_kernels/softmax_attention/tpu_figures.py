"""How much of a TPU's peak splash attention's kernels reach, by the compiler's static cycles: predictions, kept.

The static profiler does not follow grids that depend on tables. Without any, the same kernels compute every pair of
blocks, with the masks for order and documents in each. So what is counted is the work on blocks that are computed, not
the turns of the grid that pass over others.

``python -m pallas_kernels.softmax_attention.tpu_figures v5p v6e`` counts again, minutes a chip, and renews
``tpu_shares.json``.

Shapes: S tokens, H query heads, G key-value heads, K channels.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from pallas_kernels.aot import CHIPS, Chip, ProfileError, compiler_version, static_cycles
from pallas_kernels.softmax_attention.tpu import choose_blocks
from pallas_kernels.softmax_attention.tpu_kernels import Kernels

TABLE = Path(__file__).with_name("tpu_shares.json")
# Matrix products of each kernel, 2 K FLOPs a pair and head; by what its name contains.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
TOKENS, CHANNELS = 4096, 128


def case(query_heads: int, key_heads: int) -> tuple[Callable, tuple[Any, ...]]:
    """All three kernels over every pair of a row, bf16, as ``static_cycles`` takes it."""
    q, k = (jax.ShapeDtypeStruct((heads, TOKENS, CHANNELS), jnp.bfloat16) for heads in (query_heads, key_heads))
    sums = jax.ShapeDtypeStruct((query_heads, TOKENS), jnp.float32)
    row = jax.ShapeDtypeStruct((1, TOKENS, query_heads, CHANNELS), q.dtype)
    kernels = Kernels(choose_blocks(row, row), interpret=False)

    def run(q_HSK, do_HSK, lse_HS, delta_HS, k_GSK, v_GSK, ids_S):
        segment_ids = SegmentIds(ids_S, ids_S)
        every_pair = MaskInfo(None, None, None, None, jnp.arange(TOKENS, dtype=jnp.int32))
        forward = kernels.forward(q_HSK, k_GSK, v_GSK, segment_ids, every_pair)
        of_queries, of_keys = (q_HSK, do_HSK, lse_HS, delta_HS), (k_GSK, v_GSK)
        return forward, kernels.backward(of_queries, of_keys, segment_ids, every_pair, every_pair)

    return run, (q, q, sums, sums, k, k, jax.ShapeDtypeStruct((TOKENS,), jnp.int32))


def predict(chip: Chip, query_heads: int, key_heads: int, timeout: float = 900) -> dict[str, float]:
    """Share of the chip's peak that each of ``PRODUCTS`` reaches on blocks that it computes.

    Args:
      query_heads, key_heads: key heads of an even number run as two halves in the backward pass, others in one grid.

    Raises:
      ProfileError: if this compiler's profiler does not follow the kernels.
    """
    arguments = {"query_heads": query_heads, "key_heads": key_heads}
    cycles = static_cycles(chip, "pallas_kernels.softmax_attention.tpu_figures:case", arguments, timeout)
    found = {}
    for kernel, products in PRODUCTS.items():
        spent = next(count for name, count in cycles.items() if f"_{kernel}_" in name)
        flops = products * 2.0 * CHANNELS * query_heads * TOKENS**2
        found[kernel] = round(flops / chip.flops / (spent / chip.clock), 3)
    return found


@functools.cache
def share_of_peak(device_kind: str, kernel: str, halved: bool) -> float | None:
    """What the table knows of a kernel, one of ``PRODUCTS``, on a kind of device; None for devices not counted."""
    rows = json.loads(TABLE.read_text())["shares"]
    row = next((row for row in rows if row["device"] == device_kind), None)
    return row and row["halved" if halved else "one_grid"][kernel]


def _main(names: Sequence[str]) -> None:
    if unknown := set(names) - set(CHIPS):
        sys.exit(f"there is no chip {', '.join(sorted(unknown))}: choose from {', '.join(CHIPS)}")
    rows = {row["device"]: row for row in json.loads(TABLE.read_text())["shares"]}
    for name in names or CHIPS:
        chip = CHIPS[name]
        try:
            halved = predict(chip, 4, 2)
            # On one core there is no difference.
            one_grid = predict(chip, 6, 3) if chip.cores > 1 else halved
        except ProfileError as error:
            print(error)
            continue
        by = f"static cycles, libtpu {compiler_version()}"
        rows[chip.device_kind] = {"device": chip.device_kind, "halved": halved, "one_grid": one_grid, "by": by}
        print(name, rows[chip.device_kind], flush=True)
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows.values())
        TABLE.write_text(f'{{"shares": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    _main(sys.argv[1:])
