"""Seconds add up, over starts too, and what was lost is no longer productive."""

import pytest

from mmx.train.goodput import COMPILING, DATA, LOST, PRODUCTIVE, RESTARTING, SAVING, WAYS, Goodput, describe


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def seconds(row):
    return {way: row[f"seconds_{way}"] for way in WAYS if row[f"seconds_{way}"]}


def first_start(clock) -> list[dict]:
    """Rows of a run that starts in 5 s, compiles for 20 and takes 4 steps of 10, with a save after the second."""
    goodput = Goodput(now=clock)
    clock.time += 5
    rows = [{"step": 0, **goodput.row()}]
    with goodput.spending(COMPILING):
        clock.time += 20
    goodput.spend(PRODUCTIVE)
    for step in range(1, 5):
        with goodput.spending(DATA):
            clock.time += 1
        clock.time += 9
        rows.append({"step": step, **goodput.row()})
        if step == 2:
            with goodput.spending(SAVING):
                clock.time += 3
            goodput.saved()
    return rows


def test_every_second_is_spent_once():
    clock = Clock()
    rows = first_start(clock)
    assert seconds(rows[-1]) == {RESTARTING: 5, COMPILING: 20, PRODUCTIVE: 36, DATA: 4, SAVING: 3}
    assert sum(seconds(rows[-1]).values()) == clock.time - 1000
    assert rows[-1]["goodput"] == pytest.approx(36 / 68, abs=1e-4)


def test_another_start_counts_the_gap_and_what_is_taken_again():
    clock = Clock()
    rows = first_start(clock)
    clock.time += 100
    row = Goodput(rows, 2, clock).row()
    assert seconds(row) == {RESTARTING: 105, COMPILING: 20, PRODUCTIVE: 18, LOST: 18, DATA: 4, SAVING: 3}
    assert row["starts"] == 2
    # Killed before the next save, again: nothing is forgotten and nothing counted twice.
    rows = [*rows[:3], {"step": 2, **row}]
    clock.time += 50
    assert seconds(Goodput(rows, 2, clock).row()) == seconds(row) | {RESTARTING: 155}


def test_a_start_from_nothing_loses_all_steps():
    clock = Clock()
    row = Goodput(first_start(clock), None, clock).row()
    assert seconds(row)[LOST] == 36
    assert PRODUCTIVE not in seconds(row)


def test_going_back_loses_the_steps_since_the_save():
    clock = Clock()
    goodput = Goodput(now=clock)
    goodput.spend(PRODUCTIVE)
    clock.time += 10
    goodput.saved()
    clock.time += 7
    goodput.went_back()
    clock.time += 2
    assert seconds(goodput.row()) == {PRODUCTIVE: 12, LOST: 7}
    goodput.went_back()
    assert seconds(goodput.row()) == {PRODUCTIVE: 10, LOST: 9}


def test_in_words():
    rows = first_start(Clock())
    words = describe(rows[-1])
    assert words.startswith("of 68 s over 1 start: 52.9% taking steps, 5.9% waiting for data, 29.4% compiling")
    assert describe({"step": 1, "loss": 2.0}) is None


def test_rows_of_earlier_versions_have_no_time():
    assert Goodput([{"step": 3, "loss": 2.0}], 3, Clock()).row()["starts"] == 1
