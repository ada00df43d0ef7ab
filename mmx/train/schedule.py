"""The learning rate, a function of the tokens trained on. Computed on the host: exact for 10^13 tokens, unlike fp32."""

import math

from mmx.config import OptimizerConfig, Phase


def learning_rate(config: OptimizerConfig, tokens: int, tokens_per_step: int) -> float:
    """Rate of the update that brings the run to ``tokens`` tokens, so the first warm-up step has a rate above 0.

    Args:
      config: its phases follow each other, each starting from the level at which its predecessor ended, the first from
        ``start_level``.
      tokens: trained on so far, those of this update included.
      tokens_per_step: turns the lengths of phases that count steps into tokens; the run's initial batch, so that a
        batch that grows later does not stretch them.
    """
    start, level = 0, config.start_level
    for phase in config.schedule:
        length = phase.tokens or phase.steps * tokens_per_step
        if not length or tokens <= start + length:
            share = (tokens - start) / length if length else 1.0
            return config.peak_lr * _level(phase, level, share)
        start, level = start + length, phase.to
    return config.peak_lr * level


def _level(phase: Phase, start: float, share: float) -> float:
    """Share of the peak rate, ``share`` of the way through a phase that began at level ``start``."""
    if phase.kind == "linear":
        return start + (phase.to - start) * share
    if phase.kind == "cosine":
        return phase.to + (start - phase.to) * 0.5 * (1 + math.cos(math.pi * share))
    if phase.kind == "exponential":
        return start * (phase.to / start) ** share
    return phase.to
