"""Counts what splash attention's kernels reach with blocks of several sizes, and writes it into their table.

The table keeps every size that compiles: ``tpu_blocks.py`` chooses among them by the length of a row.
"""

import jax

from pallas_kernels.aot import Chip, ProfileError, compiler_version
from pallas_kernels.size_table import renew_row
from pallas_kernels.softmax_attention.tpu_blocks import PRODUCTS, TABLE, Sizes
from pallas_kernels.softmax_attention.tpu_figures import Call

# Queries and keys of a block. The first is where the keys that are worked on at a time are chosen. With 4,096 keys,
# what fits with one compiler may take 9 MiB more with another.
_BLOCKS = ((1024, 2048), (1024, 1024), (512, 1024), (512, 512), (512, 2048), (2048, 2048), (2048, 1024))
_COMPUTE = (512, 1024, 256)


def search(chip: Chip, dtype: str, channels: int, timed: bool) -> None:
    """Renews the row of a dtype and head size, by time on the chip that is here or by static cycles."""
    row = {"device": chip.device_kind, "dtype": dtype, "channels": channels}
    for kernel in PRODUCTS:
        shares: dict[Sizes, float] = {}

        def count(sizes: Sizes, kernel=kernel, shares=shares) -> float:
            share = _share(chip, Call(kernel, sizes, channels=channels, dtype=dtype), timed)
            if share is not None:
                shares[sizes] = share
            return share or 0.0

        # dq works on a whole block of keys.
        compute = max(_COMPUTE if kernel != "dq" else _COMPUTE[:1], key=lambda c: count(Sizes(*_BLOCKS[0], c)))
        for queries, keys in _BLOCKS[1:]:
            count(Sizes(queries, keys, min(keys, compute)))
        if not shares:
            print(f"{chip.name} {dtype} {channels}: {kernel} could not be profiled; the table stays as it is")
            return
        row[kernel] = [[*sizes, round(share, 3)] for sizes, share in shares.items()]
    row["by"] = "time" if timed else f"static cycles, libtpu {compiler_version()}"
    renew_row(TABLE, row, ("device", "dtype", "channels"))


def _share(chip: Chip, call: Call, timed: bool) -> float | None:
    """Of the chip's peak; None for sizes that do not compile or cannot be profiled."""
    share, note = None, ""
    try:
        share = call.measure(chip) if timed else call.predict(chip)
    except (ProfileError, jax.errors.JaxRuntimeError) as error:
        note = str(error)[:160]
    sizes = " ".join(f"{field}={value}" for field, value in call.sizes._asdict().items())
    said = f"{share:.3f} of the peak" if share is not None else note
    print(f"{chip.name} {call.dtype} {call.channels} {call.kernel} {sizes}: {said}", flush=True)
    return share
