"""Reading ahead on other threads, with a bound on what is held in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
# Copying and reading leave the interpreter free for a second thread.
THREADS = 2


def read_ahead(tasks: Iterable[tuple[int, Callable[[], Result]]], budget: int) -> Iterator[Result]:
    """Results of tasks in their order, while later ones are being made.

    Args:
      tasks: bytes of a result, and what makes it.
      budget: most bytes of results made or being made and not taken yet; one task runs whatever its size.
    """
    waiting: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for size, task in tasks:
                while waiting and (held + size > budget or len(waiting) > THREADS):
                    done_size, future = waiting.popleft()
                    yield future.result()
                    held -= done_size
                waiting.append((size, pool.submit(task)))
                held += size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, future in waiting:
                future.cancel()
