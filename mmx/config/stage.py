"""One stage of a run that has several, and how its data passes from one to the next.

The report extends the context in three (section 4.3, Table 6): each has a longer sequence, another RoPE base, other
shares of short, medium and long documents, and long question-answer samples towards its end; the shares move linearly
from one stage's to the next's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mmx.config.errors import ConfigError
from mmx.config.mesh import MeshConfig
from mmx.config.optimizer import Phase

Weights = dict[str, float]


@dataclasses.dataclass
class Stage:
    """What a stage sets in place of the fields of the same names in the run's branches.

    It ends with the step that reaches ``tokens``, or after ``steps``, whichever is given.
    """

    name: str
    tokens: int = 0
    steps: int = 0
    sequence_length: int = 512
    batch_size: int = 8
    micro_batches: int = 1
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rope_base: float = 10_000.0
    # Phases of this stage alone, as shares of optimizer.peak_lr; the first starts where the stage before ended.
    schedule: tuple[Phase, ...] = (Phase("constant", 1.0),)
    # Entries as in data.mixture.
    mixture: tuple[str, ...] = ()
    # Share of the stage's rows over which the weights move from those that the stage before ended with.
    transition: float = 0.0
    # Read besides ``mixture`` in the last ``late_rows`` of the rows, where it has ``late_share`` of the tokens.
    late_mixture: tuple[str, ...] = ()
    late_rows: float = 0.2
    late_share: float = 0.1
    heldout_sequences: int = 64
    batch_marks: tuple[float, ...] = ()

    @property
    def rows(self) -> int:
        """Rows that the stage reads. A batch that grows changes them by less than one of its steps."""
        batch_tokens = self.batch_size * self.sequence_length
        return (self.steps or -(-self.tokens // batch_tokens)) * self.batch_size

    def validate(self) -> None:
        """Raises ConfigError with a sentence that says what to change; names are those within the stage."""
        if not self.name:
            raise ConfigError("name is empty: give the stage one, metrics carry it")
        if self.steps < 0 or self.tokens < 0 or bool(self.steps) == bool(self.tokens):
            raise ConfigError("needs either tokens or steps, positive")
        if self.sequence_length < 2 or self.batch_size < 1:
            raise ConfigError("sequence_length must be at least 2 and batch_size at least 1")
        if not self.schedule:
            raise ConfigError("schedule is empty: give at least one Phase")
        for name in ("transition", "late_rows", "late_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is a share: use 0 or more and less than 1")
        if self.transition + (self.late_rows if self.late_mixture else 0) > 1:
            raise ConfigError("transition and late_rows overlap: lower one of them")
        if self.late_mixture and not self.mixture:
            raise ConfigError("late_mixture has nothing to mix with: name what the stage reads in mixture")


def mixture_over_rows(stages: Sequence[Stage], index: int, before: Sequence[str]) -> list[tuple[int, tuple[str, ...]]]:
    """Rows of a stage's stream and the mixture entries that hold there, linear in between.

    Args:
      stages, index: the stage is ``stages[index]``.
      before: entries that the first stage's transition starts from, as in ``data.mixture``; empty: it has none.
    """
    stage = stages[index]
    own = _normalised(stage.mixture)
    start = _at_end(stages[index - 1]) if index else _normalised(before)
    points: list[tuple[int, Weights]] = [(0, own)]
    transition_rows = round(stage.transition * stage.rows)
    if transition_rows and start and own:
        points = [(0, start), (transition_rows, own)]
    late_row = stage.rows - round(stage.late_rows * stage.rows)
    if stage.late_mixture and 0 < late_row < stage.rows:
        # From one row to the next, not gradually.
        if late_row - 1 > points[-1][0]:
            points.append((late_row - 1, own))
        points.append((late_row, _at_end(stage)))
    return [(row, _entries(weights)) for row, weights in points]


def _at_end(stage: Stage) -> Weights:
    own, late = _normalised(stage.mixture), _normalised(stage.late_mixture)
    if not late:
        return own
    mixed = {name: (1 - stage.late_share) * weight for name, weight in own.items()}
    for name, weight in late.items():
        mixed[name] = mixed.get(name, 0.0) + stage.late_share * weight
    return mixed


def _normalised(entries: Sequence[str]) -> Weights:
    """Weights that sum to 1. Raises ConfigError for an entry that is none."""
    weights: Weights = {}
    for entry in entries:
        name, _, weight = entry.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ConfigError(f"mixture: {entry!r} must read source=weight, as in '{name}=0.5'") from None
        if weights[name] <= 0:
            raise ConfigError(f"mixture: the weight in {entry!r} must be greater than 0")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _entries(weights: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(f"{name}={weight:.10g}" for name, weight in weights.items())
