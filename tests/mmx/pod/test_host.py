"""The part that runs on a host, where the whole lives of pods do not lead."""

import json
import os

import pytest

from mmx.pod import buckets, host


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MMX_HOST_NAME", "here")
    (tmp_path / "mmx-run").mkdir()
    return tmp_path


def test_after_a_reboot_the_run_is_dead_whoever_has_its_number_now(home, capsys):
    (home / "mmx-run" / "command.json").write_text(json.dumps({"launcher": "pretrain", "attempt": 2, "started": 1.0}))
    (home / "mmx-run" / "pids.json").write_text(json.dumps({"supervisor": os.getpid(), "launcher": 1}))
    assert host.main(["status"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["running"], answer["exit"], answer["attempt"]) == (False, None, 2)


def test_nothing_was_started(capsys):
    assert host.main(["status"]) == 0
    assert json.loads(capsys.readouterr().out)["attempt"] is None
    assert host.main(["stop"]) == 0
    assert json.loads(capsys.readouterr().out) == {"host": "here", "stopping": []}


def test_a_bucket_that_cannot_be_written_is_named_once(home, monkeypatch, capsys):
    (home / "gcloud").write_text("#!/bin/sh\necho 'HTTPError 403: no access' >&2\nexit 1\n")
    (home / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}{os.pathsep}{os.environ['PATH']}")
    copies = host._Copies("gs://mine/logs/")
    copies.copy()
    copies.copy()
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["== the log could not be copied to gs://mine/logs/here.log: HTTPError 403: no access"]


def test_paths_in_buckets_become_folders(home, monkeypatch):
    monkeypatch.setattr(buckets, "_mount", lambda bucket: home / bucket)
    arguments = ["pretrain", "--workdir=gs://b-1/run", "--config.data.path=gs://b.2/data/", "--note=see gs://b-1"]
    assert buckets.mount_buckets(arguments) == [
        "pretrain",
        f"--workdir={home}/b-1/run",
        f"--config.data.path={home}/b.2/data/",
        "--note=see gs://b-1",  # No path, but words.
    ]
