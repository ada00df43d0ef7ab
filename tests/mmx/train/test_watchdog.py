"""A run that hangs leaves its stacks and ends; one that goes on is left alone."""

import subprocess
import sys
import time

import pytest

from mmx.train.watchdog import HUNG, STACKS, Watchdog, write_to_stderr

HANGS = """
import sys, threading, time
from pathlib import Path
from mmx.train.watchdog import Watchdog, write_to_stderr

def waits_for_a_peer():
    {hang}

if {threads}:
    threading.Thread(target=waits_for_a_peer, daemon=True).start()
with Watchdog(0.4, Path(sys.argv[1]), 3, write_to_stderr).watching() as watchdog:
    for step in range(3):
        watchdog.alive(f"in step {{step}}")
        time.sleep(0.2)
    waits_for_a_peer()
"""
# The second one never lets go of Python's lock, so that no thread of Python runs any more.
SLEEPS = "time.sleep(60)"
KEEPS_THE_LOCK = "__import__('ctypes').PyDLL(None).sleep(60)"


@pytest.mark.parametrize("hang", [SLEEPS, KEEPS_THE_LOCK], ids=["waiting", "holding the lock"])
def test_hung_process_leaves_its_stacks(tmp_path, hang):
    started = time.monotonic()
    command = [sys.executable, "-c", HANGS.format(hang=hang, threads=hang == SLEEPS), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert time.monotonic() - started < 30
    stacks = (tmp_path / STACKS / "process-3.txt").read_text()
    assert "in waits_for_a_peer" in stacks
    if hang == SLEEPS:
        assert stacks.count("in waits_for_a_peer") == 2  # of both threads
        assert result.returncode == HUNG
        assert "hung in step 2 for more than 0.4 s; the stacks of all threads are in" in result.stderr
        assert "hung in step 2 for 0.4 s" in stacks
    else:
        assert result.returncode == 1


def test_nothing_is_left_by_a_run_that_goes_on(tmp_path):
    with Watchdog(0.2, tmp_path, 0, write_to_stderr).watching() as watchdog:
        time.sleep(0.5)  # Before the first step there is no limit.
        for step in range(5):
            watchdog.alive(f"in step {step}")
            time.sleep(0.08)
    assert not (tmp_path / STACKS).exists()


def test_no_limit(tmp_path):
    with Watchdog(0, tmp_path, 0, write_to_stderr).watching() as watchdog:
        watchdog.alive("in step 1")
        time.sleep(0.1)
    assert not (tmp_path / STACKS).exists()
