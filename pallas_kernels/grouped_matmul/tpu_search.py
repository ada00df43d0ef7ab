"""Counts what megablox's kernels reach with tiles of several sizes, and writes it into their table.

The table keeps every tile that compiles: ``tpu_tiles.py`` chooses among them by the size of the groups.
"""

from pallas_kernels.aot import Chip, ProfileError, compiler_version
from pallas_kernels.grouped_matmul.tpu_figures import Call
from pallas_kernels.grouped_matmul.tpu_tiles import TABLE
from pallas_kernels.size_table import renew_row

# Rows, input and output channels.
_TILES = {
    "gmm": (
        (128, 1024, 1536),
        (256, 1024, 1536),
        (512, 1024, 1024),
        (512, 1024, 1536),
        (512, 1024, 3072),
        (1024, 1024, 1024),
        (1024, 1024, 1536),
    ),
    "tgmm": (
        (128, 1024, 1024),
        (256, 1024, 1024),
        (512, 1024, 1024),
        (512, 1024, 512),
        (1024, 1024, 1024),
        (1024, 1024, 512),
    ),
}


def search(chip: Chip, dtype: str) -> None:
    """Renews the row of a dtype by static cycles, of kernels that work on the same tiles in the same order."""
    row = {"device": chip.device_kind, "dtype": dtype}
    for kernel, tiles in _TILES.items():
        row[kernel] = []
        for tile in tiles:
            said = f"{chip.name} {dtype} {kernel} {' x '.join(map(str, tile))}"
            try:
                share = Call(kernel, tile, dtype=dtype).predict(chip)
            except ProfileError as error:
                print(f"{said}: {error}"[:200], flush=True)
                continue
            print(f"{said}: {share:.3f} of the peak", flush=True)
            row[kernel].append([*tile, round(share, 3)])
        if not row[kernel]:
            print(f"{chip.name} {dtype}: {kernel} could not be profiled; the table stays as it is")
            return
    row["by"] = f"static cycles, libtpu {compiler_version()}"
    renew_row(TABLE, row, ("device", "dtype"))
