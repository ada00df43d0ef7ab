"""AdamW and the schedule of its learning rate."""

import dataclasses

from mmx.config.errors import ConfigError

PHASE_KINDS = ("linear", "constant", "exponential", "cosine")


@dataclasses.dataclass
class Phase:
    """One piece of the learning-rate schedule.

    ``to`` is the rate at its end as a share of ``optimizer.peak_lr`` (a constant phase holds it throughout). Its
    length is ``steps`` or ``tokens``; the last phase may have neither and lasts until the end.
    """

    kind: str
    to: float
    steps: int = 0
    tokens: int = 0


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW as the report has it (section 4.2); eps and clipping are not printed there and are our choice."""

    peak_lr: float = 2e-4
    schedule: tuple[Phase, ...] = (Phase("linear", 1.0, steps=500), Phase("constant", 1.0))
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    # Largest global norm of the gradient; 0 turns clipping off.
    clip_norm: float = 1.0
    # Level, as a share of peak_lr, from which the first phase starts.
    start_level: float = 0.0

    def validate(self) -> None:
        """Raises ConfigError with a sentence that says what to change."""
        for field in ("peak_lr", "eps"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"optimizer.{field}={getattr(self, field)} must be greater than 0")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"optimizer.{field}={getattr(self, field)} must be in [0, 1)")
        for field in ("weight_decay", "clip_norm", "start_level"):
            if getattr(self, field) < 0:
                raise ConfigError(f"optimizer.{field}={getattr(self, field)} must not be negative")
        if not self.schedule:
            raise ConfigError("optimizer.schedule is empty: give at least one Phase")
        for index, phase in enumerate(self.schedule):
            where = f"optimizer.schedule[{index}]"
            if phase.kind not in PHASE_KINDS:
                raise ConfigError(f"{where}.kind={phase.kind!r} is not one of {', '.join(PHASE_KINDS)}")
            if phase.steps < 0 or phase.tokens < 0 or (phase.steps and phase.tokens):
                raise ConfigError(f"{where} needs either steps or tokens, positive")
            is_last = index == len(self.schedule) - 1
            if not (phase.steps or phase.tokens) and not (is_last and phase.kind == "constant"):
                raise ConfigError(f"{where} has no length: only a last, constant phase may go on until the end")
            previous = self.schedule[index - 1].to if index else self.start_level
            if phase.kind == "exponential" and (phase.to <= 0 or previous <= 0):
                raise ConfigError(f"{where} decays exponentially, so it must start and end above 0")
