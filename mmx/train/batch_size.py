"""When the batch doubles: as the training loss reaches marks that were fitted beforehand (report section 4.2, Fig. 13).

The critical batch size grows as the loss falls. The batch starts at the size for the first loss and doubles at each
mark; it never shrinks, and the learning rate stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass
class BatchGrowth:
    """Decides from the losses of steps done how often the batch has doubled at later ones.

    The loss is smoothed, and must lie at or below the mark for ``patience`` steps in a row, so that one easy batch
    doubles nothing; after a doubling the count starts again.

    Attributes:
      marks: losses, falling.
      smoothing: steps of the moving average.
      patience: steps in a row.
      smoothed, weight, below: state: the average before its correction, the correction, the steps in a row.
      doubled_from: state: step from which each doubling holds.
    """

    marks: Sequence[float]
    smoothing: int
    patience: int
    smoothed: float = 0.0
    weight: float = 0.0
    below: int = 0
    doubled_from: list[int] = dataclasses.field(default_factory=list)

    def observe(self, step: int, loss: float) -> None:
        """Takes in the loss of a step, steps in order. A loss that is not finite is left out."""
        if not math.isfinite(loss):
            return
        self.smoothed += (loss - self.smoothed) / self.smoothing
        self.weight += (1 - self.weight) / self.smoothing
        done = len(self.doubled_from)
        if done == len(self.marks):
            return
        self.below = self.below + 1 if self.smoothed / self.weight <= self.marks[done] else 0
        if self.below == self.patience:
            # The next step may have been started when this one's loss became known. Always waiting for it makes the
            # doubling's step independent of when the loss was looked at: a resumed run doubles where it would have.
            self.doubled_from.append(step + 2)
            self.below = 0

    def doublings(self, step: int) -> int:
        """How often the batch of ``step`` has doubled; losses up to the second step before it count."""
        return sum(first <= step for first in self.doubled_from)

    def state(self) -> dict[str, float | int | list[int]]:
        """What a checkpoint holds."""
        values = {name: getattr(self, name) for name in ("smoothed", "weight", "below")}
        return {**values, "doubled_from": list(self.doubled_from)}
