"""Watching a run: resumed whenever it is down, until it is over or cannot work."""

from __future__ import annotations

import time
from collections.abc import Callable

from mmx.pod.control import Incomplete, Look, NotComing, Pod
from mmx.pod.gcloud import GcloudError
from mmx.pod.hosts import Condition
from mmx.pod.record import Launch


class Watch:
    """One run on one pod."""

    def __init__(self, pod: Pod, launch: Launch, extras: str, failures: int, poll: float, say: Callable[[str], None]):
        """``failures`` in a row, without a new step or checkpoint between, end the watch; ``poll`` is in seconds."""
        self._pod, self._launch, self._extras, self._say = pod, launch, extras, say
        self._limit, self._poll = failures, poll
        self._farthest, self._failed = -1, 0
        self._shown = ""
        self._last: Look | None = None

    def to_end(self) -> int:
        """Looks again and again.

        Returns:
          0 if the run finished or somebody stopped it, 1 if it kept failing.

        Raises:
          ConfigError: if gcloud refuses the first look, or the pod's request failed too often.
        """
        while True:
            try:
                look = self._pod.look()
                if (status := self._judge(look)) is not None:
                    return status
                if self._is_down(look):
                    self._pod.resume(self._launch, self._extras)
                self._last = look
            except (GcloudError, NotComing, Incomplete) as error:
                # Networks and zones have bad minutes, and a watch that ends in one of them is no watch; but what never
                # worked is a mistake.
                if self._last is None and not isinstance(error, NotComing):
                    raise
                self._failed += isinstance(error, NotComing) and error.state.name == "FAILED"
                if self._failed >= self._limit:
                    raise
                self._show(f"{error}; trying again")
            time.sleep(self._poll)

    def _judge(self, look: Look) -> int | None:
        """The status to end with, or None to go on."""
        condition = look.condition
        self._show(f"{look.state}: {condition.value if condition else 'no host answers'}", f"; {look.progress}")
        # What was stopped before this watch began is what it was called to start.
        if condition is Condition.FINISHED or (condition is Condition.STOPPED and self._last is not None):
            return 0
        reached = max(-1 if step is None else step for step in (look.progress.step, look.progress.checkpoint))
        if reached > self._farthest:
            self._farthest, self._failed = reached, 0
        if condition is Condition.FAILED:
            self._failed += 1
            for line in look.hosts.failures()[:4]:
                self._say(line)
            if self._failed >= self._limit:
                self._say(
                    f"failed {self._failed} times in a row without getting beyond step {self._farthest}: giving up"
                )
                return 1
        return None

    def _is_down(self, look: Look) -> bool:
        """Whether to resume. Hosts start and end within seconds of each other: only a second partial look counts."""
        if look.condition is Condition.PARTIAL:
            return self._last is not None and self._last.condition is Condition.PARTIAL
        return look.condition not in (Condition.RUNNING, Condition.ENDING)

    def _show(self, line: str, more: str = "") -> None:
        if line != self._shown:
            self._say(f"{time.strftime('%F %T')} {line}{more}")
            self._shown = line
