"""How long a Pallas kernel's call takes, predicted.

By the cycles that the compiler counted, kept in tables beside the kernels: of lightning attention, of splash attention
on the blocks that it computes (on the diagonal of a row, all of a block), of the experts' products on their tiles (one
more where two groups meet). On a chip that was not counted, at its peak FLOP/s: an optimistic guess.
"""

from __future__ import annotations

from collections.abc import Callable

from mmx.plan.work import Kernel
from pallas_kernels.aot.chips import Chip
from pallas_kernels.grouped_matmul import tpu_tiles
from pallas_kernels.lightning_attention.tpu_tiles import TABLE
from pallas_kernels.size_table import read_rows
from pallas_kernels.softmax_attention import tpu_blocks


def kernel_seconds(chip: Chip) -> Callable[[Kernel], float]:
    """Time of a call of a kernel on one device of ``chip``."""
    rows = read_rows(TABLE)
    known = [r["ns_per_token_and_head"] for r in rows if r["device"] == chip.device_kind and r["dtype"] == "bfloat16"]
    lightning = dict(zip(("forward", "backward"), known[0], strict=True)) if known else None

    def seconds(kernel: Kernel) -> float:
        if kernel.token_heads and lightning:
            return kernel.token_heads * lightning["forward" if "forward" in kernel.name else "backward"] * 1e-9
        share = None
        if splash := kernel.splash:
            share = tpu_blocks.share_of_peak(chip.device_kind, splash.kernel, splash.tokens, splash.whole_row)
            if share and not splash.every_core:
                share /= chip.cores
        elif kernel.grouped:
            name = "tgmm" if "tgmm" in kernel.name else "gmm"
            share = tpu_tiles.share_of_peak(chip.device_kind, name, *kernel.grouped)
        return kernel.flops / ((share or 1.0) * chip.flops)

    return seconds
