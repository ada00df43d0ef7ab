"""One run a workdir: a file that says who has it, and keeps others out.

The lock of a process that is gone is taken over: at once if it ran on this host, otherwise after its owner has shown no
sign of life for a while (the owner counts them in the file; clocks of hosts are not compared).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mmx.config import ConfigError
from mmx.parallel.processes import Board

LOCK = "lock.json"
# Seconds between an owner's signs of life, and without one until another host takes over.
BEAT = 10.0
SILENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process that has a workdir."""

    user: str
    host: str
    boot: str  # of the host: process numbers mean nothing after the next one
    process: int
    started: str  # of the lock, local time
    born: str  # of the process, in the kernel's ticks: its number may be used again
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.process} of {self.user} on {self.host}, since {self.started}"


@contextlib.contextmanager
def locked_for_all(workdir: Path, board: Board, log: Callable[[str], None]) -> Iterator[None]:
    """As ``locked``, by process 0 of a run on behalf of all; raises the same everywhere."""
    with contextlib.ExitStack() as stack:
        refusal = ""
        if board.index == 0:
            try:
                stack.enter_context(locked(workdir, log))
            except ConfigError as error:
                refusal = str(error)
        if refusal := board.gather(refusal)[0]:
            raise ConfigError(refusal)
        yield


@contextlib.contextmanager
def locked(workdir: Path, log: Callable[[str], None], beat: float = BEAT, silence: float = SILENCE) -> Iterator[None]:
    """Holds a workdir, which is made if it is not there.

    Raises:
      ConfigError: if another run has it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    me = Owner(
        _user(), socket.gethostname(), _boot(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"), _born(os.getpid())
    )
    _acquire(workdir, me, log, beat, silence)
    left = threading.Event()
    thread = threading.Thread(target=_show_life, args=(workdir, me, left, beat), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
        with _alone(workdir):
            if _is_same(_read(workdir), me):
                (workdir / LOCK).unlink()


def _acquire(workdir: Path, me: Owner, log: Callable[[str], None], beat: float, silence: float) -> None:
    deadline = time.monotonic() + silence
    first: Owner | None = None
    while True:
        with _alone(workdir):
            owner = _read(workdir)
            if owner is None or _is_gone(owner) or (owner == first and time.monotonic() > deadline):
                if owner is not None:
                    log(f"{workdir} was left locked by {owner}, which is gone: going on in its place")
                _write(workdir, me)
                return
        if owner.host == me.host or (first is not None and owner != first):
            raise ConfigError(f"{workdir} is in use by {owner}: stop that run, or take another --workdir")
        if first is None:
            log(f"{workdir} is locked by {owner}: waiting up to {silence:.0f} s to see whether that run lives")
            first = owner
        time.sleep(min(beat, silence) / 4)


def _show_life(workdir: Path, me: Owner, left: threading.Event, beat: float) -> None:
    while not left.wait(beat):
        # A full disk, or a disk that is away for a moment, is the next save's business.
        with contextlib.suppress(OSError), _alone(workdir):
            me = dataclasses.replace(me, beats=me.beats + 1)
            if _is_same(_read(workdir), me):
                _write(workdir, me)


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[None]:
    """Looking at the file and writing it are one act; the system ends this by itself when a process dies."""
    handle = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(workdir: Path) -> Owner | None:
    try:
        return Owner(**json.loads((workdir / LOCK).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None  # Cut off by a kill or a full disk: nobody that lives wrote it, for a writer renames.


def _write(workdir: Path, owner: Owner) -> None:
    partial = workdir / f"{LOCK}.partial"
    partial.write_text(json.dumps(dataclasses.asdict(owner)) + "\n")
    partial.replace(workdir / LOCK)


def _is_same(owner: Owner | None, me: Owner) -> bool:
    return owner is not None and dataclasses.replace(owner, beats=me.beats) == me


def _is_gone(owner: Owner) -> bool:
    """Whether this host knows that the owner is no more."""
    if owner.host != socket.gethostname():
        return False
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # Somebody else's process.
        pass
    return owner.boot != _boot() or owner.born != _born(owner.process)


def _born(process: int) -> str:
    try:
        # Behind the name, which is in brackets and may hold anything: the 20th field is the start time.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
