"""Tables of the sizes that kernels run with: data in the repository.

A row for each kind of device and dtype and, of attention, head size.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows."""
    return json.loads(path.read_text())["rows"]


def renew_row(path: Path, row: dict[str, Any], identity: Sequence[str]) -> None:
    """Puts a row in the place of the one with the same identity, or beside the others."""
    rows = [other for other in read_rows(path) if any(other[field] != row[field] for field in identity)]
    rows = sorted([*rows, row], key=lambda row: [str(row[field]) for field in identity])
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"rows": [\n  {lines}\n]}}\n')
