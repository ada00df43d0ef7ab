"""Checksums of a checkpoint's files, so that one that was cut off or altered later is told from a whole one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUMS = "checksums.json"
# What Orbax writes at and after the final rename; nothing that is restored lies in it.
WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_ALGORITHM = "sha256"
_THREADS = 8  # hashing leaves Python's lock to others


def write_checksums(folder: Path) -> None:
    """Writes the size and SHA-256 of every file of a checkpoint into it. Nothing may be writing there."""
    left_out = {folder / name for name in (CHECKSUMS, *WRITTEN_LATER)}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in left_out)
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(_digest, paths)
        files = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, _ALGORITHM: digest}
            for path, digest in zip(paths, sums, strict=True)
        }
    (folder / CHECKSUMS).write_text(json.dumps({"files": files}, indent=1) + "\n")


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint that ``write_checksums`` saw, a phrase each.

    One without checksums, as older and converted ones are, cannot be checked and passes.

    Args:
      part, parts: reads every ``parts``-th file alone, so that several processes share the work.
    """
    if not (folder / CHECKSUMS).exists():
        return []
    try:
        files = json.loads((folder / CHECKSUMS).read_text())["files"]
        expected = [(name, int(entry["bytes"]), str(entry[_ALGORITHM])) for name, entry in sorted(files.items())]
    except (ValueError, LookupError, TypeError, AttributeError):
        return [f"{CHECKSUMS} is not what was written"]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda entry: _damage(folder, *entry), expected[part::parts])
    return [phrase for phrase in found if phrase]


def first_of(damage: Sequence[str]) -> str:
    """The first phrase, and how many more there are."""
    return damage[0] + (f" and {len(damage) - 1} more files" if len(damage) > 1 else "")


def _damage(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{CHECKSUMS} names a file outside, {name}"
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
        return None if _digest(path) == digest else f"{name} has another checksum than when it was written"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _ALGORITHM).hexdigest()
