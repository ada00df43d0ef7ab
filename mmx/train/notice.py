"""Notices that a Google Cloud machine will be stopped, turned into the SIGTERM that everything else understands.

The metadata server of a machine says when it is preempted or about to be stopped for maintenance
(cloud.google.com/compute/docs/metadata/predefined-metadata-keys), earlier than a SIGTERM, if one comes at all.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

# Names another metadata server, for Google's libraries as for us.
HOST = "GCE_METADATA_HOST"
_EVERY = 5.0
_PATH = "/computeMetadata/v1/instance/"
# Key, and what it says while nothing is to happen.
_KEYS = {"preempted": "FALSE", "maintenance-event": "NONE"}
# Live migration only makes a machine slow for some seconds.
_HARMLESS = ("MIGRATE_ON_HOST_MAINTENANCE",)


@contextlib.contextmanager
def heeding_notices(log: Callable[[str], None], every: float = _EVERY) -> Iterator[None]:
    """While open, a notice sends SIGTERM to this process. Does nothing outside Google Cloud."""
    host = os.environ.get(HOST) or ("metadata.google.internal" if _is_google() else None)
    if host is None:
        yield
        return
    closed = threading.Event()
    thread = threading.Thread(target=_watch, args=(host, log, every, closed), name="notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join(timeout=1)


def _watch(host: str, log: Callable[[str], None], every: float, closed: threading.Event) -> None:
    while not closed.wait(every):
        for key, nothing in _KEYS.items():
            notice = _ask(host, key)
            if notice in (None, "", nothing, *_HARMLESS):
                continue
            log(f"this machine will be stopped ({key}: {notice}): saving and leaving")
            if not closed.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
            return


def _ask(host: str, key: str) -> str | None:
    """A value of the metadata server; None if it does not answer, which it may not while a machine is moved."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection(host, timeout=2)
        with contextlib.closing(connection):
            connection.request("GET", _PATH + key, headers={"Metadata-Flavor": "Google"})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace").strip()
            # Another server at this name would not answer with the header.
            return text if answer.status == 200 and answer.getheader("Metadata-Flavor") == "Google" else None
    return None


def _is_google() -> bool:
    try:
        return "Google" in Path("/sys/class/dmi/id/product_name").read_text()
    except OSError:
        return False
