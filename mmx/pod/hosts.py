"""What the hosts of a pod answer, put together: is the run going, over, or broken?"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json

from mmx.pod.progress import Progress


class Condition(enum.Enum):
    """How a run is."""

    NOT_STARTED = "not started"
    RUNNING = "running"
    ENDING = "ending"  # Some hosts are done, or were told to stop; the others still save.
    PARTIAL = "running on some hosts only"  # The others failed or are new: it will not go on.
    FINISHED = "finished"
    STOPPED = "stopped on request"
    INTERRUPTED = "interrupted"  # Saved and left because it was told to, as before a preemption.
    FAILED = "failed"


@dataclasses.dataclass(frozen=True)
class Hosts:
    """One object a host, as ``mmx.pod.host status`` printed it."""

    answers: list[dict]
    expected: int

    @property
    def running(self) -> int:
        """Hosts on which the launcher is there."""
        return sum(answer["running"] for answer in self.answers)

    @property
    def started(self) -> float | None:
        """When the last attempt began, seconds since the epoch."""
        return max((answer["started"] for answer in self.answers if answer["started"]), default=None)

    @property
    def attempt(self) -> int:
        """How often this pod started the run."""
        return max((answer["attempt"] or 0 for answer in self.answers), default=0)

    def progress(self) -> Progress:
        """The farthest that any host sees; they share a workdir, or one of them has it."""
        seen = [Progress(**answer["progress"]) for answer in self.answers if "progress" in answer]
        rank = lambda p: (p.step if p.step is not None else -1, p.checkpoint if p.checkpoint is not None else -1)  # noqa: E731
        return max(seen, key=rank, default=Progress())

    def failures(self) -> list[str]:
        """Hosts that ended badly, each with its status."""
        return [
            f"{answer['host']}: status {'unknown' if answer['exit'] is None else answer['exit']}"
            for answer in self.answers
            if not answer["running"] and answer["attempt"] and answer["exit"] != 0
        ]

    def condition(self, progress: Progress) -> Condition:
        """What all answers mean together."""
        stopped = any(answer["stopped"] for answer in self.answers)
        if self.running:
            # A host that did not answer may only be slow to; where it is gone, the others notice and end.
            done = [answer for answer in self.answers if not answer["running"]]
            if any(answer["exit"] != 0 for answer in done) and not stopped:
                return Condition.PARTIAL
            return Condition.ENDING if done or stopped else Condition.RUNNING
        if stopped:
            return Condition.STOPPED
        if not any(answer["attempt"] for answer in self.answers):
            return Condition.NOT_STARTED
        if self.failures() or len(self.answers) < self.expected:
            return Condition.FAILED
        # SIGTERM ends a run with 0 as well: it is over only if it was as long as it should be.
        reached = max(progress.checkpoint or 0, progress.step or 0)
        unfinished = progress.steps is not None and reached < progress.steps
        return Condition.INTERRUPTED if unfinished else Condition.FINISHED


def parse_answers(printed: str, field: str) -> list[dict]:
    """The hosts' lines with this field, among all else that ssh prints."""
    answers = []
    for line in printed.splitlines():
        if line.startswith('{"host":'):
            with contextlib.suppress(json.JSONDecodeError):
                answers.append(json.loads(line))
    return [answer for answer in answers if field in answer]
