"""Steps that must not count: not finite, or far above the running average of the loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Share of a new loss in the running average.
_NEW = 0.02


class Health(NamedTuple):
    """What a run remembers of its last steps; part of the state, so that a resumed run decides as it would have."""

    bad_in_a_row: jax.Array  # steps, int32
    average_loss: jax.Array  # nats a token over the good steps, fp32; 0 before the first


def fresh_health() -> Health:
    """Of a run that has taken no step."""
    return Health(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))


def judge(health: Health, loss: jax.Array, grad_norm: jax.Array, spike_factor: float) -> tuple[jax.Array, Health]:
    """Whether a step counts, and the health after it.

    Args:
      loss, grad_norm: of the step, fp32 scalars.
      spike_factor: a loss above this multiple of the average does not count; 0 judges only whether it is finite.
    """
    good = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    is_first = health.average_loss == 0
    if spike_factor:
        good &= is_first | (loss <= spike_factor * health.average_loss)
    average = jnp.where(is_first, loss, health.average_loss + _NEW * (loss - health.average_loss))
    return good, Health(
        jnp.where(good, 0, health.bad_in_a_row + 1), jnp.where(good, average, health.average_loss).astype(jnp.float32)
    )
