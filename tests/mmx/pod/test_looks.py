"""Reading states, hosts and progress."""

import json
import os
import time

import pytest

from mmx.pod.hosts import Condition, Hosts, parse_answers
from mmx.pod.progress import Progress, read_checkpoints, read_progress, show_seconds
from mmx.pod.states import Phase, parse_state


@pytest.mark.parametrize(
    ("described", "phase", "shown"),
    [
        ({"state": "WAITING_FOR_RESOURCES"}, Phase.WAITING, "WAITING_FOR_RESOURCES"),
        ({"state": "ACCEPTED"}, Phase.WAITING, "ACCEPTED"),
        ({"state": "SOMETHING_NEW"}, Phase.WAITING, "SOMETHING_NEW"),
        ({"state": "ACTIVE", "stateInitiator": "SERVICE"}, Phase.READY, "ACTIVE"),
        ({"state": "SUSPENDING", "stateInitiator": "SERVICE"}, Phase.LEAVING, "SUSPENDING (by Google)"),
        ({"state": "SUSPENDED", "stateInitiator": "USER"}, Phase.GONE, "SUSPENDED (by its user)"),
        ({"state": "FAILED", "failedData": {"error": {"message": "no room"}}}, Phase.GONE, "FAILED (no room)"),
        ({}, Phase.WAITING, "STATE_UNSPECIFIED"),
    ],
)
def test_states(described, phase, shown):
    state = parse_state(json.dumps({"state": described}))
    assert (state.phase, str(state)) == (phase, shown)


def answer(running=True, exit=None, stopped=False, attempt=1, host="a") -> dict:
    started = 1.0 if attempt else None
    about = {"host": host, "running": running, "exit": exit, "stopped": stopped}
    return about | {"attempt": attempt, "started": started}


GOING, DONE, DEAD, CRASHED = answer(), answer(False, 0), answer(False), answer(False, 1)
FRESH, STOPPED = answer(False, attempt=None), answer(False, 0, stopped=True)


@pytest.mark.parametrize(
    ("answers", "reached", "condition"),
    [
        ([GOING, GOING], 5, Condition.RUNNING),
        ([GOING], 5, Condition.RUNNING),  # One does not answer.
        ([GOING, CRASHED], 5, Condition.PARTIAL),
        ([GOING, FRESH], 5, Condition.PARTIAL),
        ([DONE, DONE], 10, Condition.FINISHED),
        ([DONE, DONE], 5, Condition.INTERRUPTED),
        ([DONE], 10, Condition.FAILED),  # The other was replaced or is gone.
        ([DONE, CRASHED], 10, Condition.FAILED),
        ([DEAD, DEAD], 5, Condition.FAILED),
        ([FRESH, FRESH], None, Condition.NOT_STARTED),
        ([STOPPED, STOPPED], 5, Condition.STOPPED),
        ([answer(stopped=True), STOPPED], 5, Condition.ENDING),
        ([answer(stopped=True)] * 2, 5, Condition.ENDING),
        ([GOING, DONE], 5, Condition.ENDING),
    ],
)
def test_conditions(answers, reached, condition):
    assert Hosts(answers, 2).condition(Progress(step=reached, steps=10)) is condition


def test_failures_name_the_host():
    assert Hosts([GOING, CRASHED | {"host": "b"}, DEAD], 3).failures() == ["b: status 1", "a: status unknown"]


def test_answers_are_found_among_noise():
    line = json.dumps(GOING)
    printed = f'SSH: Attempting\n{line}\n{{"host": "b", "started": 1}}\n{{"host": "c", "runn\nhello\n{line}'
    assert parse_answers(printed, "running") == [GOING, GOING]


def test_progress_of_a_workdir(tmp_path):
    assert str(read_progress(tmp_path)) == "no step is logged yet, no checkpoint yet"
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "heldout_loss": 2.4}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text("x" * 100_000 + "\n" + text)
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 9}}))
    for step in (2, 10, 9):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    (tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir()
    os.utime(tmp_path / "checkpoints" / "10", (time.time() - 600,) * 2)
    assert str(read_progress(tmp_path)) == "step 2 of 9, loss 2.5000, checkpoint of step 10, 10 min old"


def test_checkpoints_in_a_bucket():
    progress = Progress()
    read_checkpoints("gs://b/run/checkpoints/5/\ngs://b/run/checkpoints/20/\ngs://b/run/checkpoints/x.tmp/\n", progress)
    assert str(progress).endswith("checkpoint of step 20")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (119, "119 s"), (180, "3 min"), (90000, "25 h"), (3e5, "3 d")]
)
def test_durations(seconds, shown):
    assert show_seconds(seconds) == shown
