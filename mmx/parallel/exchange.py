"""Moving tokens to the devices that hold their experts and back: expert and expert-tensor parallelism.

Report section 3.1. Experts are split over ``expert``, each expert's hidden channels over ``expert_tensor``; tokens are
split over every mesh axis. Three bodies share one contract and run inside an island:

- "padded": each device sends each expert a bucket of ``capacity`` rows, filled or not. Static shapes, one
  ``all_to_all`` there and one back, batched products. Buckets need a capacity: without one they hold the worst case.
- "ragged": rows travel without padding (``lax.ragged_all_to_all``) and are sorted by expert where they arrive. Nothing
  is dropped for want of room; the receiving buffer has room for the worst case.
- "gather": every device of an expert group sees all the group's tokens and adds up what its experts make of them
  (all-gather, reduce-scatter). Moves most bytes when groups are large, fewest when they have two devices. It is also
  the body of a device that holds all experts, where nothing moves.

Expert tensor parallelism gathers the rows of its group before the experts and reduce-scatters their partial sums after
them. Tokens may be cut into groups, each an exchange of its own, so that one group's communication can run while
another's rows are multiplied (the report's EP-ETP overlap).

Shapes: T tokens, J chosen experts a token, A = T * J assignments, D channels, E experts, N experts of this device,
P devices of an expert group (as destination, S as source), Q devices of an expert-tensor group, C rows of a bucket,
R rows received, M rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from mmx.parallel.axes import axis_size
from mmx.parallel.dispatch import plan_dispatch, rows_from_tokens, tokens_from_rows
from mmx.parallel.ragged import ragged_all_to_all, route
from pallas_kernels.platform import target_platform

EXPERT, EXPERT_TENSOR = "expert", "expert_tensor"


class LocalExperts(Protocol):
    """This device's experts on rows of tokens. Under expert tensor parallelism the results are partial sums."""

    def grouped(self, rows_MD: jax.Array, group_sizes_N: jax.Array) -> jax.Array:
        """Rows sorted by expert."""

    def batched(self, rows_NMD: jax.Array) -> jax.Array:
        """As many rows for each expert."""


class Assignments(NamedTuple):
    """What the router decided for this device's tokens."""

    experts_TJ: jax.Array  # int32 in 0..E-1, best first
    weights_TJ: jax.Array  # fp32
    kept_TJ: jax.Array | None  # bool; None keeps all, up to the capacity


def exchange(
    x_TD: jax.Array,
    assignments: Assignments,
    experts: LocalExperts,
    *,
    num_experts: int,
    capacity: int | None,
    body: str,
    groups: int,
) -> tuple[jax.Array, jax.Array]:
    """Sends each token through its experts.

    Args:
      x_TD: this device's tokens.
      num_experts: E, over all devices.
      capacity: most assignments that an expert takes from one group of one device; None keeps all.
      body: "padded", "ragged" or "gather".
      groups: equal groups that the tokens are cut into.

    Returns:
      The weighted sums of the experts' results, [T, D] in fp32 or wider (the padded and ragged bodies) or rounded to
      x's dtype in between (what crosses devices always is), and which assignments were kept, bool [T, J].
    """
    run = _BODIES[body]
    cut = lambda a, g: a.reshape(groups, -1, *a.shape[1:])[g]  # noqa: E731
    results = [
        run(cut(x_TD, g), jax.tree.map(lambda a, g=g: cut(a, g), assignments), experts, num_experts, capacity)
        for g in range(groups)
    ]
    y, kept = zip(*results, strict=True)
    return (y[0], kept[0]) if groups == 1 else (jnp.concatenate(y), jnp.concatenate(kept))


def choose_body(wanted: str, has_capacity: bool, global_router: bool) -> str:
    """The body for ``wanted="auto"`` on the mesh and platform in scope; any other value stays.

    Buckets pay where each device's share of an expert is bounded. Under the global router or without a capacity it is
    not, and rows travel unpadded on TPU. XLA's ragged all-to-all on GPUs reaches a hundredth of NVLink's rate
    (BUILD_NOTES.md), and CPUs have none: both gather instead.
    """
    if axis_size(EXPERT, EXPERT_TENSOR) == 1:
        return "gather"
    if wanted != "auto":
        return wanted
    if has_capacity and not global_router:
        return "padded"
    return "ragged" if target_platform() == "tpu" else "gather"


def _padded(x_TD, assignments, experts, num_experts, capacity):
    P = axis_size(EXPERT)
    N = num_experts // P
    C = x_TD.shape[0] if capacity is None else min(capacity, x_TD.shape[0])  # A token chooses an expert once.
    dispatch = plan_dispatch(assignments.experts_TJ, num_experts, C, kept_TJ=assignments.kept_TJ, buckets=True)
    rows_PNCD = rows_from_tokens(x_TD, dispatch).reshape(P, N, C, -1)
    rows_NMD = _swap_devices(rows_PNCD).swapaxes(0, 1).reshape(N, P * C, -1)
    if axis_size(EXPERT_TENSOR) > 1:
        rows_NMD = lax.all_gather(rows_NMD, EXPERT_TENSOR, axis=1, tiled=True)
    rows_NMD = experts.batched(rows_NMD)
    if axis_size(EXPERT_TENSOR) > 1:
        rows_NMD = lax.psum_scatter(rows_NMD, EXPERT_TENSOR, scatter_dimension=1, tiled=True)
    rows_PNCD = _swap_devices(rows_NMD.reshape(N, P, C, -1).swapaxes(0, 1))
    y_TD = tokens_from_rows(rows_PNCD.reshape(num_experts * C, -1), assignments.weights_TJ, dispatch)
    return y_TD, dispatch.kept_TJ


def _swap_devices(x_P: jax.Array) -> jax.Array:
    """Part p of device s becomes part s of device p."""
    return x_P if axis_size(EXPERT) == 1 else lax.all_to_all(x_P, EXPERT, split_axis=0, concat_axis=0, tiled=True)


def _ragged(x_TD, assignments, experts, num_experts, capacity):
    T, J = assignments.experts_TJ.shape
    P, Q = axis_size(EXPERT), axis_size(EXPERT_TENSOR)
    N = num_experts // P
    dispatch = plan_dispatch(assignments.experts_TJ, num_experts, capacity, kept_TJ=assignments.kept_TJ)
    there = route(dispatch.group_sizes_E.reshape(P, N), EXPERT)
    # A token chooses an expert once, and an expert takes at most ``capacity`` rows of a device.
    from_one = min(T * min(J, N), N * min(capacity or T, T))
    rows_RD = ragged_all_to_all(rows_from_tokens(x_TD, dispatch), there, rows=P * from_one, axis=EXPERT)
    sizes_QSN = there.received_SN[None]
    if Q > 1:
        rows_RD = lax.all_gather(rows_RD, EXPERT_TENSOR, axis=0, tiled=True)
        sizes_QSN = lax.all_gather(there.received_SN, EXPERT_TENSOR)
    if Q == N == 1:
        rows_RD = experts.grouped(rows_RD, jnp.sum(sizes_QSN, axis=(0, 1)))
    else:
        # What arrived is sorted by device and then by expert; the grouped product wants it by expert.
        expert_R = _expert_of_rows(sizes_QSN, P * from_one)
        by_expert = plan_dispatch(expert_R[:, None], N)
        rows_MD = experts.grouped(rows_from_tokens(rows_RD, by_expert), by_expert.group_sizes_E)
        ones_R1 = jnp.ones((expert_R.size, 1), assignments.weights_TJ.dtype)
        rows_RD = tokens_from_rows(rows_MD, ones_R1, by_expert).astype(x_TD.dtype)
    if Q > 1:
        rows_RD = lax.psum_scatter(rows_RD, EXPERT_TENSOR, scatter_dimension=0, tiled=True)
    rows_AD = ragged_all_to_all(rows_RD, there.reversed(), rows=T * J, axis=EXPERT)
    return tokens_from_rows(rows_AD, assignments.weights_TJ, dispatch), dispatch.kept_TJ


def _expert_of_rows(sizes_QSN: jax.Array, rows: int) -> jax.Array:
    """The expert of each of Q * ``rows`` rows, int32; N for rows that hold nothing."""
    Q, S, N = sizes_QSN.shape
    ends_QB = jnp.cumsum(sizes_QSN.reshape(Q, S * N), axis=1)
    block_QR = jax.vmap(lambda ends_B: jnp.searchsorted(ends_B, jnp.arange(rows), side="right"))(ends_QB)
    return jnp.where(block_QR < S * N, block_QR % N, N).astype(jnp.int32).reshape(-1)


def _gather(x_TD, assignments, experts, num_experts, capacity):
    over = tuple(axis for axis in (EXPERT, EXPERT_TENSOR) if axis_size(axis) > 1)
    experts_TJ, weights_TJ, kept_TJ = assignments
    if not over:
        dispatch = plan_dispatch(experts_TJ, num_experts, capacity, kept_TJ=kept_TJ)
        rows_MD = experts.grouped(rows_from_tokens(x_TD, dispatch), dispatch.group_sizes_E)
        return tokens_from_rows(rows_MD, weights_TJ, dispatch), dispatch.kept_TJ
    if capacity is not None:
        kept_TJ = plan_dispatch(experts_TJ, num_experts, capacity, kept_TJ=kept_TJ).kept_TJ
    wanted_TJ = experts_TJ if kept_TJ is None else jnp.where(kept_TJ, experts_TJ, num_experts)
    x_GD, wanted_GJ, weights_GJ = (lax.all_gather(a, over, axis=0, tiled=True) for a in (x_TD, wanted_TJ, weights_TJ))
    N = num_experts // axis_size(EXPERT)
    first = lax.axis_index(EXPERT) * N
    dispatch = plan_dispatch(jnp.where(wanted_GJ < num_experts, wanted_GJ - first, -1), N)
    rows_MD = experts.grouped(rows_from_tokens(x_GD, dispatch), dispatch.group_sizes_E)
    y_GD = tokens_from_rows(rows_MD, weights_GJ, dispatch).astype(x_TD.dtype)
    y_TD = lax.psum_scatter(y_GD, over, scatter_dimension=0, tiled=True)
    return y_TD, jnp.ones(experts_TJ.shape, bool) if kept_TJ is None else kept_TJ


_BODIES: dict[str, Callable] = {"padded": _padded, "ragged": _ragged, "gather": _gather}


def even_share(tokens: int, choices: int, num_experts: int, factor: float) -> int:
    """Assignments that ``factor`` times an even share is, rounded up: an expert's capacity for ``tokens`` tokens."""
    return math.ceil(factor * tokens * choices / num_experts)
