"""When to go back to a checkpoint: too many steps in a row that did not count.

It is what people do by hand in large runs (PaLM, section 5.1): restart from a checkpoint before the trouble, and let
the data that led to it go by unseen.
"""

from __future__ import annotations

from mmx.config import ConfigError
from mmx.train.step import StepMetrics

# Times that a run goes back to the same checkpoint before it gives up.
_TRIES = 3


class Recovery:
    """Counts with the run, the same on every process."""

    def __init__(self, limit: int):
        """``limit``: bad steps in a row that make the run go back; 0 never does."""
        self._limit = limit
        self._before: StepMetrics | None = None
        self._step, self._tries = -1, 0

    def is_due(self, metrics: StepMetrics) -> bool:
        """Whether the run must go back, given the metrics of a step that was just started.

        Looks at the step before that one, so that the devices never wait for the answer.
        """
        before, self._before = self._before, metrics
        return bool(self._limit) and before is not None and int(before.bad_in_a_row) >= self._limit

    def may_save(self, metrics: StepMetrics) -> bool:
        """Whether a state is fit to go back to; waits for its step."""
        return not self._limit or int(metrics.bad_in_a_row) == 0

    def went_back(self, step: int | None) -> None:
        """Takes note of where the run goes back to.

        Raises:
          ConfigError: if there is no checkpoint, or the run has gone back to this one too often.
        """
        self._before = None
        if step is None:
            raise ConfigError(
                f"{self._limit} steps in a row were skipped (train.rollback_after) and there is no checkpoint to go "
                "back to: lower optimizer.peak_lr or raise train.spike_factor"
            )
        self._tries = self._tries + 1 if step == self._step else 1
        self._step = step
        if self._tries > _TRIES:
            raise ConfigError(
                f"{self._limit} steps in a row were skipped again after going back to step {step} {_TRIES} times: "
                "lower optimizer.peak_lr or raise train.spike_factor"
            )
