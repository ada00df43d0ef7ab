"""Sections that fail, hang, work, or need their part on the CPU; a process that runs one imports nothing heavy."""

import os
import time


def fails(sink):
    sink.result("one", value=1)
    raise RuntimeError("as planned")


def works(sink):
    sink.result("two", value=2)


def hangs(sink):
    time.sleep(60)


def writes(sink):
    (sink.folder / "note").write_text(os.environ["JAX_PLATFORMS"])
    sink.result("written", written=True)


def reads(sink):
    sink.result("read", note=(sink.folder / "note").read_text())
