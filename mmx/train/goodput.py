"""Where the wall time of a run went, over all its starts: taking steps that stayed, or anything else.

Every metrics row carries the seconds spent so far in each way, so that nothing but metrics.jsonl is needed to know
them, also after a kill. When a run starts again, the steps after its checkpoint turn out to have been lost, and the
time since its last row was spent not running.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

PRODUCTIVE, LOST, DATA, COMPILING, SAVING, EVALUATING, RESTARTING = (
    "productive",
    "lost",
    "data",
    "compiling",
    "saving",
    "evaluating",
    "restarting",
)
# In words, for people.
WAYS = {
    PRODUCTIVE: "taking steps",
    LOST: "taking steps that were lost and taken again",
    DATA: "waiting for data",
    COMPILING: "compiling",
    SAVING: "waiting for saves",
    EVALUATING: "evaluating",
    RESTARTING: "starting and restoring, and between an end and the next start",
}
_PREFIX = "seconds_"
_TIME, _STARTS = "time", "starts"


class Goodput:
    """A clock that is always running for one way of spending time; it begins with starting."""

    def __init__(self, rows: Sequence[Mapping[str, Any]] = (), resumed_step: int | None = None, now=time.time):
        """Goes on from the rows that a run wrote before.

        Args:
          rows: of metrics.jsonl, in order, those included that will be taken again.
          resumed_step: of the checkpoint that the run goes on from; None if it starts from nothing.
          now: the clock, seconds since 1970.
        """
        self._now: Callable[[], float] = now
        self._seconds = dict.fromkeys(WAYS, 0.0)
        self._way, self._since = RESTARTING, now()
        self._starts = 1
        rows = [row for row in rows if _TIME in row]
        if rows:
            last = rows[-1]
            self._seconds = {way: float(last.get(_PREFIX + way, 0.0)) for way in WAYS}
            self._seconds[RESTARTING] += max(0.0, self._since - last[_TIME])
            self._starts = last[_STARTS] + 1
            kept = [row for row in rows if row["step"] <= (-1 if resumed_step is None else resumed_step)]
            self._lose(self._seconds[PRODUCTIVE] - (kept[-1][_PREFIX + PRODUCTIVE] if kept else 0.0))
        self._kept = self._seconds[PRODUCTIVE]

    def spend(self, way: str) -> str:
        """From now on, time is spent this way; returns how it was until now."""
        now, before = self._now(), self._way
        self._seconds[before] += now - self._since
        self._way, self._since = way, now
        return before

    @contextlib.contextmanager
    def spending(self, way: str) -> Iterator[None]:
        """Spends the time inside one way, and goes on as before."""
        before = self.spend(way)
        try:
            yield
        finally:
            self.spend(before)

    def saved(self) -> None:
        """What was productive until now will stay."""
        self.spend(self._way)
        self._kept = self._seconds[PRODUCTIVE]

    def went_back(self) -> None:
        """The steps since the last save are lost."""
        self.spend(self._way)
        self._lose(self._seconds[PRODUCTIVE] - self._kept)

    def row(self) -> dict[str, float | int]:
        """What a metrics row says: the time, seconds by way, number of starts, and the productive share."""
        self.spend(self._way)
        total = sum(self._seconds.values())
        seconds = {_PREFIX + way: round(value, 3) for way, value in self._seconds.items()}
        share = self._seconds[PRODUCTIVE] / total if total else 0.0
        return {"goodput": round(share, 4), _STARTS: self._starts, _TIME: round(self._now(), 3), **seconds}

    def _lose(self, seconds: float) -> None:
        self._seconds[PRODUCTIVE] -= seconds
        self._seconds[LOST] += seconds


def describe(row: Mapping[str, Any]) -> str | None:
    """The goodput of a metrics row in words; None if the row has none."""
    seconds = {way: row.get(_PREFIX + way, 0.0) for way in WAYS}
    total = sum(seconds.values())
    if not total:
        return None
    shares = ", ".join(
        f"{seconds[way] / total:.1%} {words}" for way, words in WAYS.items() if seconds[way] >= 0.0005 * total
    )
    starts = row.get(_STARTS, 1)
    return f"of {total:,.0f} s over {starts} start{'s' if starts > 1 else ''}: {shares}"
