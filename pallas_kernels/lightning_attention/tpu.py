"""Lightning attention on TPU: the two kernels joined by a custom gradient, and operands brought into their layout.

The forward pass under differentiation leaves the state that enters each block, in fp32 and named
``LIGHTNING_STATES``: a rematerialisation policy that keeps this name (with the outputs) spares the second run of the
forward kernel for K x V x 4 bytes a block and head; one that does not recomputes it. Between the edges of blocks the
backward kernel recomputes states itself.

Shapes: B batch, S tokens, H heads, K key channels, V value channels, D heads x channels, N blocks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.lightning_attention.tpu_backward import backward
from pallas_kernels.lightning_attention.tpu_block import Boundaries
from pallas_kernels.lightning_attention.tpu_forward import forward
from pallas_kernels.lightning_attention.tpu_plan import F32, Plan, Tiles
from pallas_kernels.lightning_attention.tpu_tiles import LANES, packed, padded
from pallas_kernels.segments import document_starts

LIGHTNING_STATES = "lightning_attention_states"


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def lightning_attention_tpu(
    q_BSHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    slopes_H: jax.Array,
    segment_ids_BS: jax.Array | None,
    initial_BHKV: jax.Array,
    forward_tiles: Tiles,
    backward_tiles: Tiles,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Lightning attention; ``op.py`` states the contract.

    Args:
      forward_tiles, backward_tiles: sizes of the kernels; both have the same block.
      interpret: what ``pallas_call`` takes.
    """
    args = (q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, initial_BHKV)
    return _forward(*args, forward_tiles, interpret, keep_states=False)[0]


def _forward(q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, initial_BHKV, tiles, interpret, keep_states):
    (_, _, H, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    plan = _plan(q_BSHK, v_BSHV, segment_ids_BS, tiles, interpret)
    o_BSD, final_BHKV, *states = forward(
        plan,
        *(_flatten(plan, x) for x in (q_BSHK, k_BSHK, v_BSHV)),
        slopes_H.astype(F32),
        _boundaries(segment_ids_BS, plan),
        _pack_state(plan, initial_BHKV),
        keep_states,
    )
    return (_unflatten(o_BSD, H, V), _unpack_state(plan, final_BHKV, K, V)), states


def _forward_rule(
    q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, initial_BHKV, forward_tiles, backward_tiles, interpret
):
    operands = (q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS)
    outputs, (states_BNHKV,) = _forward(*operands, initial_BHKV, forward_tiles, interpret, keep_states=True)
    return outputs, (*operands, checkpoint_name(states_BNHKV, LIGHTNING_STATES))


def _backward_rule(forward_tiles, backward_tiles, interpret, residuals, cotangents):
    q_BSHK, k_BSHK, v_BSHV, slopes_H, segment_ids_BS, states_BNHKV = residuals
    do_BSHV, dfinal_BHKV = cotangents
    (_, _, H, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    plan = _plan(q_BSHK, v_BSHV, segment_ids_BS, backward_tiles, interpret)
    dq_BSD, dk_BSD, dv_BSD, dinitial_BHKV = backward(
        plan,
        *(_flatten(plan, x) for x in (q_BSHK, k_BSHK, v_BSHV, do_BSHV)),
        slopes_H.astype(F32),
        _boundaries(segment_ids_BS, plan),
        states_BNHKV,
        _pack_state(plan, dfinal_BHKV),
    )
    grads = (_unflatten(x, H, width) for x, width in ((dq_BSD, K), (dk_BSD, K), (dv_BSD, V)))
    # Slopes are constants of the architecture: no gradient. Segment ids are integers.
    return *grads, jnp.zeros_like(slopes_H), None, _unpack_state(plan, dinitial_BHKV, K, V)


lightning_attention_tpu.defvjp(_forward_rule, _backward_rule)


def _plan(q_BSHK, v_BSHV, segment_ids_BS, tiles, interpret) -> Plan:
    (_, S, H, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    P = packed(H, K, V)
    heads = max(heads for heads in range(1, tiles.heads + 1) if H // P % heads == 0)
    key, value = padded(K * P), padded(V * P)
    return Plan(tiles, S, heads, key, value, q_BSHK.dtype, segment_ids_BS is not None, interpret, P)


def _boundaries(segment_ids_BS: jax.Array | None, plan: Plan) -> Boundaries | None:
    return None if segment_ids_BS is None else Boundaries.of(document_starts(segment_ids_BS), plan.tiles)


def _flatten(plan: Plan, x_BSHD: jax.Array) -> jax.Array:
    """Heads side by side. Nothing moves where they fill the lanes; others are padded, unless they go in pairs."""
    B, S, _, D = x_BSHD.shape
    padding = -D % LANES if plan.packed == 1 else 0
    return jnp.pad(x_BSHD, ((0, 0), (0, 0), (0, 0), (0, padding))).reshape(B, S, -1)


def _unflatten(x_BSD: jax.Array, heads: int, width: int) -> jax.Array:
    B, S, _ = x_BSD.shape
    return x_BSD.reshape(B, S, heads, -1)[..., :width]


def _pack_state(plan: Plan, state_BHKV: jax.Array) -> jax.Array:
    """States as the kernels hold them: padded, or those of a pack as the blocks on the diagonal of one."""
    B, H, K, V = state_BHKV.shape
    P = plan.packed
    if P == 1:
        return jnp.pad(state_BHKV, ((0, 0), (0, 0), (0, plan.key - K), (0, plan.value - V)))
    state_BHPKV = state_BHKV.reshape(B, H // P, P, K, V)
    on_diagonal = jnp.eye(P, dtype=bool)[:, None, :, None]
    return jnp.where(on_diagonal, state_BHPKV[:, :, :, :, None], 0).reshape(B, H // P, P * K, P * V)


def _unpack_state(plan: Plan, state_BHKV: jax.Array, K: int, V: int) -> jax.Array:
    """The inverse of ``_pack_state``."""
    B, H = state_BHKV.shape[:2]
    P = plan.packed
    if P == 1:
        return state_BHKV[..., :K, :V]
    state_BHPKPV = state_BHKV.reshape(B, H, P, K, P, V)
    return jnp.stack([state_BHPKPV[:, :, p, :, p] for p in range(P)], axis=2).reshape(B, H * P, K, V)
