"""The gradient noise scale: the batch size, in tokens, at which noise and signal of a gradient are equally large.

The two-batch estimator (McCandlish et al., arXiv 1812.06162, appendix A): the expected squared norm of a mean gradient
over n tokens is |G|^2 + tr(S) / n, with the true gradient G and the covariance S of one token's. Gradient accumulation
has such means over a micro-batch and over the whole batch; two equations give both unknowns. Each is noisy, so they are
averaged over steps before they are divided: a mean of ratios would be biased.

A proxy of the critical batch size, which the report does not say how it measured.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax


class GradientNoise(NamedTuple):
    """Of one step, before clipping, in the units of a squared mean gradient; fp32 scalars."""

    square: jax.Array  # estimate of |G|^2; may be negative
    variance: jax.Array  # estimate of tr(S), a token


def gradient_noise(
    parts_square: jax.Array, whole_square: jax.Array, tokens: jax.Array, parts: jax.Array
) -> GradientNoise:
    """The estimate from one batch in several micro-batches, however unequal their numbers of target tokens.

    Args:
      parts_square: squared norms of the micro-batches' summed gradients, each divided by its number of tokens, summed.
      whole_square: squared norm of the batch's summed gradient.
      tokens: of the batch.
      parts: micro-batches with any token. With one, the estimate is not a number.
    """
    # Weighing each micro-batch's mean by its tokens makes the expectation exact: |G|^2 + tr(S) parts / tokens.
    small, large = parts_square / tokens, whole_square / tokens**2
    variance = (small - large) * tokens / (parts - 1)
    return GradientNoise((parts * large - small) / (parts - 1), variance)


@dataclasses.dataclass
class NoiseScale:
    """Averages over steps, weighing the last ``memory`` of them most. The other fields are its state."""

    memory: int = 100
    square: float = 0.0
    variance: float = 0.0

    def observe(self, square: float, variance: float) -> None:
        """Adds a step; one whose gradient was not finite is left out."""
        if math.isfinite(square) and math.isfinite(variance):
            # The common factor that corrects the averages' start from zero falls out of their ratio.
            self.square += (square - self.square) / self.memory
            self.variance += (variance - self.variance) / self.memory

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"square": self.square, "variance": self.variance}

    @property
    def tokens(self) -> float | None:
        """The noise scale in tokens; None while noise hides the signal."""
        return self.variance / self.square if self.square > 0 else None
