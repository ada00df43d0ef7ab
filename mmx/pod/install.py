"""Shipping this checkout to every host and installing it there, as commands."""

from __future__ import annotations

import shlex

from mmx.pod import commands
from mmx.pod.request import PodRequest

# On a host, from its home directory.
_ARCHIVE, _CHECKOUT, _PYTHON = "mmx.tar.gz", "mmx", "$HOME/mmx.venv/bin/python"


def pack(archive: str) -> list[str]:
    """Puts this checkout into an archive."""
    return ["bash", "launch/pod_pack.sh", archive]


def ship(pod: PodRequest, archive: str) -> list[str]:
    """Copies the archive to every host."""
    return commands.copy_everywhere(pod, archive, _ARCHIVE)


def install(pod: PodRequest, extras: str) -> list[str]:
    """Unpacks it on every host and makes an environment for it."""
    new = f"{_CHECKOUT}.new"
    unpack = f"rm -rf {new} && mkdir {new} && tar -xzf {_ARCHIVE} -C {new}"
    return commands.ssh_everywhere(pod, f"{unpack} && bash {new}/launch/pod_setup.sh {shlex.quote(extras)}")


def on_host(*arguments: str) -> str:
    """The shell command that calls ``mmx.pod.host`` on a host."""
    return f"cd {_CHECKOUT} && {_PYTHON} -m mmx.pod.host {shlex.join(arguments)}"
