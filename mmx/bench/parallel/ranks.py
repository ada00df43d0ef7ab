"""Rows over virtual ranks, and the time that contestants take in turns.

Shapes: B batch, S tokens, H heads, K channels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

RANKS = 8
AXIS = "context"
TOKENS = PartitionSpec(None, AXIS)
# What the times of virtual ranks cannot show.
SHARED_CORES = "the ranks share this machine's cores, so that times show the sum of their work and no waiting"
_TURNS = 5


def rank_mesh() -> Mesh:
    """The context axis over the first ``RANKS`` devices."""
    return jax.make_mesh((RANKS,), (AXIS,), axis_types=(AxisType.Explicit,), devices=jax.devices()[:RANKS])


def forward(attend: Callable[..., jax.Array], arguments: int) -> Callable[..., jax.Array]:
    """``attend`` of a rank's tokens, [B, S_local, ...] each, as a function of whole rows."""
    specs = (TOKENS,) * arguments
    return jax.shard_map(attend, mesh=rank_mesh(), in_specs=specs, out_specs=TOKENS, check_vma=False)


def gradients(attend: Callable[..., jax.Array], arguments: int) -> Callable[..., Any]:
    """Gradients of ``attend(q, k, v, *rest)`` for q, k and v; takes the output's cotangent first."""

    def local(do, q, k, v, *rest):
        return jax.vjp(lambda q, k, v: attend(q, k, v, *rest), q, k, v)[1](do)

    specs = (TOKENS,) * (arguments + 1)
    return jax.shard_map(local, mesh=rank_mesh(), in_specs=specs, out_specs=(TOKENS,) * 3, check_vma=False)


def tokens(shape: Sequence[int], seed: int) -> jax.Array:
    """Random fp32 [B, S, H, K] over the ranks."""
    return jax.device_put(
        jax.random.normal(jax.random.key(seed), shape, jnp.float32), NamedSharding(rank_mesh(), TOKENS)
    )


def integers(values: np.ndarray) -> jax.Array:
    """Integers [B, ...] over the ranks."""
    return jax.device_put(np.asarray(values, np.int32), NamedSharding(rank_mesh(), TOKENS))


def seconds_in_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call, which all take turns after one that does not count."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_TURNS):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}
