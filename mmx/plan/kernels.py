"""How long a Pallas kernel's call takes, predicted.

Lightning attention by the cycles that the compiler counted for it, kept in the table of its tiles; other kernels, which
the static profiler does not follow, at the chip's peak FLOP/s: an optimistic guess, which the calibration holds to
account.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from mmx.plan.work import Kernel
from pallas_kernels.aot.chips import Chip
from pallas_kernels.lightning_attention.tpu_tiles import TABLE


def kernel_seconds(chip: Chip) -> Callable[[Kernel], float]:
    """Time of a call of a kernel on one device of ``chip``."""
    rows = json.loads(TABLE.read_text())["tiles"]
    known = [r["ns_per_token_and_head"] for r in rows if r["device"] == chip.device_kind and r["dtype"] == "bfloat16"]
    lightning = dict(zip(("forward", "backward"), known[0], strict=True)) if known else None

    def seconds(kernel: Kernel) -> float:
        if kernel.token_heads and lightning:
            return kernel.token_heads * lightning["forward" if "forward" in kernel.name else "backward"] * 1e-9
        return kernel.flops / chip.flops

    return seconds
