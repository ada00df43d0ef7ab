"""An all-to-all in which each device sends each other one as many rows as it has for it.

Shapes: S devices as sources, P the same as destinations, N kinds of rows (experts of one device), M rows sent,
R rows received, D channels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.platform import target_platform


class Route(NamedTuple):
    """Where this device's rows lie, where they go, and what arrives; int32. Rows lie sorted by the other device."""

    sent_P: jax.Array  # rows for each destination
    starts_P: jax.Array  # where they begin among this device's rows
    landings_P: jax.Array  # where they begin at their destination
    received_SN: jax.Array  # rows of each kind from each source
    landings_back_S: jax.Array  # where each source's rows began at that source

    def reversed(self) -> Route:
        """The way back of everything that arrived."""
        received_S = self.received_SN.sum(1)
        return Route(received_S, _starts(received_S), self.landings_back_S, self.sent_P[:, None], self.landings_P)


def route(sizes_PN: jax.Array, axis: str) -> Route:
    """The route of rows sorted by destination and, within it, by kind.

    Args:
      sizes_PN: this device's rows of each kind for each destination.
      axis: mesh axis of the devices.
    """
    sizes_SPN = lax.all_gather(sizes_PN, axis)
    me = lax.axis_index(axis)
    sent_SP = sizes_SPN.sum(2)
    starts_SP, landings_SP = _starts(sent_SP, 1), _starts(sent_SP, 0)
    return Route(sent_SP[me], starts_SP[me], landings_SP[me], sizes_SPN[:, me], starts_SP[:, me])


def ragged_all_to_all(rows_MD: jax.Array, there: Route, *, rows: int, axis: str) -> jax.Array:
    """Sends rows along a route; differentiable.

    Args:
      rows_MD: sorted by destination, as the route says.
      rows: R, at least what arrives.

    Returns:
      [R, D]: what arrived, sorted by source, then zeros.
    """
    if target_platform() == "cpu":
        return _padded_all_to_all(rows_MD, there, rows, axis)
    into = jnp.zeros((rows, rows_MD.shape[1]), rows_MD.dtype)
    received_S = there.received_SN.sum(1)
    offsets = (there.starts_P, there.sent_P, there.landings_P, received_S)
    return lax.ragged_all_to_all(rows_MD, into, *(a.astype(jnp.int32) for a in offsets), axis_name=axis)


def _padded_all_to_all(rows_MD: jax.Array, there: Route, rows: int, axis: str) -> jax.Array:
    """The same through buckets as large as the worst case: XLA's CPU backend has no ragged all-to-all."""
    M, D = rows_MD.shape
    place_M = jnp.arange(M)
    index_PM = jnp.where(place_M < there.sent_P[:, None], there.starts_P[:, None] + place_M, M)
    buckets_SMD = lax.all_to_all(_take(rows_MD, index_PM), axis, split_axis=0, concat_axis=0, tiled=True)
    received_S = there.received_SN.sum(1)
    ends_S = jnp.cumsum(received_S)
    place_R = jnp.arange(rows)
    source_R = jnp.minimum(jnp.searchsorted(ends_S, place_R, side="right"), len(ends_S) - 1)
    within_R = place_R - (ends_S - received_S)[source_R]
    index_R = jnp.where(place_R < ends_S[-1], source_R * M + within_R, buckets_SMD.size // D)
    return _take(buckets_SMD.reshape(-1, D), index_R)


def _take(rows_MD: jax.Array, index: jax.Array) -> jax.Array:
    """Rows by number, zeros for a number beyond the last."""
    return rows_MD.at[index].get(mode="fill", fill_value=0)


def _starts(sizes: jax.Array, axis: int = 0) -> jax.Array:
    return jnp.cumsum(sizes, axis) - sizes
