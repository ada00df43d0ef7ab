"""Two runs on one workdir do not mix; a lock that nobody holds any more keeps nobody out."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from mmx.config import ConfigError
from mmx.train.lock import LOCK, locked


def test_holds_and_lets_go(tmp_path):
    with locked(tmp_path / "run", print):
        owner = json.loads((tmp_path / "run" / LOCK).read_text())
        assert owner["process"] == os.getpid()
        said = f"process {os.getpid()} of {owner['user']} on {owner['host']}, since {owner['started']}"
        with pytest.raises(ConfigError) as refusal, locked(tmp_path / "run", print):
            pass
        assert f"is in use by {said}: stop that run, or take another --workdir" in str(refusal.value)
        # The refused one took nothing away.
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run" / LOCK).exists()
    with locked(tmp_path / "run", print):
        pass


def rewrite(workdir, **changes):
    owner = json.loads((workdir / LOCK).read_text()) | changes
    (workdir / LOCK).write_text(json.dumps(owner))


DIES = """
import os, pathlib, signal, sys
from mmx.train.lock import locked
with locked(pathlib.Path(sys.argv[1]), print):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_lock_of_a_process_that_was_killed_is_taken_over(tmp_path):
    subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    assert (tmp_path / LOCK).exists()
    said = []
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert len(said) == 1
    assert "which is gone: going on in its place" in said[0]


@pytest.mark.parametrize("change", [{"born": "1"}, {"boot": "another"}], ids=str)
def test_a_process_number_that_is_used_again_is_another_process(tmp_path, change):
    with locked(tmp_path, print):
        content = (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).write_text(content)
    rewrite(tmp_path, **change)
    with locked(tmp_path, print):
        pass


def test_another_host_is_believed_while_it_shows_life(tmp_path):
    with locked(tmp_path, print):
        content = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(content | {"host": "elsewhere"}))
    lives = threading.Timer(0.2, lambda: rewrite(tmp_path, beats=1))
    lives.start()
    with pytest.raises(ConfigError, match="on elsewhere, since"), locked(tmp_path, print, beat=0.2, silence=20):
        pass
    # Nothing more is heard from it.
    said, started = [], time.monotonic()
    with locked(tmp_path, said.append, beat=0.2, silence=0.5):
        assert time.monotonic() - started > 0.5
    assert "waiting up to 0 s" in said[0] or "waiting up to 1 s" in said[0]
    assert "going on in its place" in said[1]


def test_owner_shows_life(tmp_path):
    with locked(tmp_path, print, beat=0.05):
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / LOCK).read_text())["beats"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    for trial in range(5):
        got, barrier = [], threading.Barrier(4)
        done = threading.Barrier(4)

        def compete(workdir=tmp_path / str(trial), got=got, barrier=barrier, done=done):
            barrier.wait()
            try:
                with locked(workdir, print):
                    got.append(True)
                    done.wait()
            except ConfigError:
                done.wait()

        threads = [threading.Thread(target=compete) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [True]


def test_a_lock_that_was_cut_off_is_no_lock(tmp_path):
    (tmp_path / LOCK).write_text('{"user": "som')
    with locked(tmp_path, print):
        json.loads((tmp_path / LOCK).read_text())
