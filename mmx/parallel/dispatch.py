"""Moving tokens to rows sorted by expert and back, with gathers only, forwards and backwards.

A scatter-add would be slow on TPU and CPU and would sum in no fixed order on GPU; since both directions of the
permutation are known, neither direction needs one.

Shapes: T tokens, J chosen experts a token, A = T * J assignments, M rows, E experts, D channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Dispatch(NamedTuple):
    """Where each assignment's row is, and which token each row comes from."""

    row_TJ: jax.Array  # int32; M for an assignment without a row
    token_M: jax.Array  # int32; token 0 for a row without an assignment
    group_sizes_E: jax.Array  # rows of each expert, int32
    kept_TJ: jax.Array  # bool


def plan_dispatch(
    experts_TJ: jax.Array,
    num_experts: int,
    capacity: int | None = None,
    *,
    kept_TJ: jax.Array | None = None,
    buckets: bool = False,
) -> Dispatch:
    """Sorts assignments by expert and drops what an expert has no room for.

    Rows of an expert, and the order in which its capacity fills, are by choice first and position second: every token's
    first choice comes before any token's second choice, and within a choice earlier tokens come first. The result is
    the same on every run. The report does not print its order; this is GShard's.

    Args:
      experts_TJ: chosen experts, best first. One outside of 0..E-1 is another device's and gets no row here.
      capacity: most rows an expert takes; None keeps everything.
      kept_TJ: bool, False for assignments that were dropped before.
      buckets: False lets experts follow each other without gaps, M = A. True gives each ``capacity`` rows, filled or
        not, M = E * capacity.
    """
    T, J = experts_TJ.shape
    A = T * J
    chosen_EA = experts_TJ.T.reshape(1, A) == jnp.arange(num_experts, dtype=experts_TJ.dtype)[:, None]
    if kept_TJ is not None:
        chosen_EA &= kept_TJ.T.reshape(1, A)
    rank_EA = jnp.cumsum(chosen_EA, axis=1, dtype=jnp.int32)
    counts_E = rank_EA[:, -1]
    sizes_E = counts_E if capacity is None else jnp.minimum(counts_E, capacity)
    if buckets:
        M, starts_E = num_experts * capacity, jnp.arange(num_experts, dtype=jnp.int32) * capacity
    else:
        M, starts_E = A, jnp.cumsum(sizes_E) - sizes_E
    # An assignment's rank within its expert, from 0, and the expert's first row.
    rank_A = jnp.sum(jnp.where(chosen_EA, rank_EA - 1, 0), axis=0)
    start_A = jnp.sum(jnp.where(chosen_EA, starts_E[:, None], 0), axis=0)
    has_row_A = jnp.any(chosen_EA, axis=0)
    if capacity is not None:
        has_row_A &= rank_A < capacity
    row_A = jnp.where(has_row_A, start_A + rank_A, M)
    token_M = jnp.zeros((M,), jnp.int32).at[row_A].set(jnp.tile(jnp.arange(T, dtype=jnp.int32), J), mode="drop")
    return Dispatch(row_A.reshape(J, T).T, token_M, sizes_E.astype(jnp.int32), has_row_A.reshape(J, T).T)


@jax.custom_vjp
def rows_from_tokens(x_TD: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Rows [M, D]: each assignment's token."""
    return x_TD[dispatch.token_M]


def _rows_forward(x_TD, dispatch):
    return rows_from_tokens(x_TD, dispatch), dispatch


def _rows_backward(dispatch, drows_MD):
    dtype = jnp.promote_types(jnp.float32, drows_MD.dtype)
    dx_TD = sum(_take(drows_MD, row_T).astype(dtype) for row_T in dispatch.row_TJ.T)
    return dx_TD.astype(drows_MD.dtype), None


rows_from_tokens.defvjp(_rows_forward, _rows_backward)


@jax.custom_vjp
def tokens_from_rows(rows_MD: jax.Array, weights_TJ: jax.Array, dispatch: Dispatch) -> jax.Array:
    """Tokens [T, D]: the weighted sum of each token's rows, in fp32 or wider; a dropped assignment adds nothing."""
    parts = zip(dispatch.row_TJ.T, weights_TJ.T, strict=True)
    return sum(weight_T[:, None] * _take(rows_MD, row_T) for row_T, weight_T in parts)


def _tokens_forward(rows_MD, weights_TJ, dispatch):
    return tokens_from_rows(rows_MD, weights_TJ, dispatch), (rows_MD, weights_TJ, dispatch)


def _tokens_backward(residuals, dy_TD):
    rows_MD, weights_TJ, dispatch = residuals
    weight_M = jnp.zeros((rows_MD.shape[0],), weights_TJ.dtype).at[dispatch.row_TJ].set(weights_TJ, mode="drop")
    drows_MD = (weight_M[:, None] * dy_TD[dispatch.token_M]).astype(rows_MD.dtype)
    dweights_TJ = jnp.stack([jnp.sum(_take(rows_MD, row_T) * dy_TD, axis=-1) for row_T in dispatch.row_TJ.T], axis=-1)
    return drows_MD, dweights_TJ.astype(weights_TJ.dtype), None


tokens_from_rows.defvjp(_tokens_forward, _tokens_backward)


def _take(rows_MD: jax.Array, row_T: jax.Array) -> jax.Array:
    """Rows by number, zeros for number M."""
    return rows_MD.at[row_T].get(mode="fill", fill_value=0)
