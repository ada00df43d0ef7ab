"""Processes that are asked to stop do so at one step, whoever was asked and however far apart they are."""

import random
import signal
import threading
import time

import pytest

from mmx.train.stop import StopRequest


class SharedBoard:
    """A board of threads that stand for processes."""

    def __init__(self, count: int):
        self.count, self._notes, self._gathered, self._barrier = count, {}, [], threading.Barrier(count)

    def pin(self, topic, note):
        self._notes[topic] = note

    def read(self, topic):
        return self._notes.get(topic)

    def gather(self, note):
        self._gathered.append(note)
        self._barrier.wait(timeout=20)
        return self._gathered


@pytest.mark.parametrize("asked", [[0], [2], [0, 1, 2]], ids=str)
def test_all_stop_before_the_same_step(asked):
    board = SharedBoard(3)
    requests = [StopRequest(board) for _ in range(3)]
    taken = [0] * 3
    # One process may be a step ahead of another: no step ends before all have begun it.
    steps = threading.Barrier(3)

    def run(number: int, chance: random.Random) -> None:
        while not requests[number].reached():
            time.sleep(chance.uniform(0, 0.02))
            steps.wait(timeout=20)
            taken[number] += 1

    threads = [threading.Thread(target=run, args=(n, random.Random(n))) for n in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    for number in asked:
        requests[number].ask(signal.SIGTERM)
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(set(taken)) == 1
    assert taken[0] > 3
    assert {request.signal for request in requests} == {signal.SIGTERM}


def test_answers_come_while_main_threads_are_busy():
    """One that is in its last step, or compiles, still answers; it never needs to come back."""
    board = SharedBoard(2)
    requests = [StopRequest(board) for _ in range(2)]
    assert not any(request.reached() for request in requests)
    requests[1].ask(signal.SIGTERM)
    time.sleep(1.5)
    assert not requests[0].signal
    assert [request.reached() for request in requests] == [True, True]


def test_one_process_stops_at_once():
    request = StopRequest(SharedBoard(1))
    assert not request.reached()
    request.ask(signal.SIGINT)
    assert not request
    assert request.reached()
    assert request.signal == signal.SIGINT
