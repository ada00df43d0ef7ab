"""Buckets as folders of a host, through Cloud Storage FUSE: a launcher reads and writes gs:// paths like any others."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_BUCKET = re.compile(r"(?<![^=,])gs://([a-z0-9][-_.a-z0-9]*)")
# Folders that exist only as a part of objects' names count as folders, too.
_OPTIONS = ("--implicit-dirs",)


def mount_buckets(arguments: Sequence[str]) -> list[str]:
    """Mounts every bucket that arguments name, and puts the folders in their place.

    Raises:
      OSError: if a bucket cannot be mounted; the message says why.
    """
    folders = {bucket: _mount(bucket) for argument in arguments for bucket in _BUCKET.findall(argument)}
    return [_BUCKET.sub(lambda found: str(folders[found[1]]), argument) for argument in arguments]


def _mount(bucket: str) -> Path:
    folder = Path.home() / "mmx-buckets" / bucket
    if os.path.ismount(folder):
        return folder
    if shutil.which("gcsfuse") is None:
        _call("bash", str(Path(__file__).parent.parent.parent / "launch" / "gcsfuse_setup.sh"))
    folder.mkdir(parents=True, exist_ok=True)
    _call("gcsfuse", *_OPTIONS, bucket, str(folder))
    return folder


def _call(*command: str) -> None:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if result.returncode:
        raise OSError(f"{' '.join(command)} ended with status {result.returncode}: {result.stderr.strip()[-500:]}")
