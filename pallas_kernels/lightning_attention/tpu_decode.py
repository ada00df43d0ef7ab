"""A few steps of lightning attention on TPU: the state is read and written once, in place, and bounds the time.

Products of a vector with a matrix would leave a matrix unit idle; the outer product, the decay and the reduction are
elementwise work that hides behind the memory. Shapes: B batch, S tokens (few), H heads, G heads of a program, K key
channels, V value channels, R = S x G.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

NAME = "lightning_attention_decode"
# More tokens than these are less work as a chunk of the forward kernel.
MOST_TOKENS = 8
_SUBLANES = 8
_LANES = 128
_MOST_HEADS = 16


def unsupported(q_BSHK: jax.Array, v_BSHV: jax.Array, state_BHKV: jax.Array) -> str | None:
    """Why the kernel, as far as it is tested, does not take these operands, or None."""
    (_, S, H, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    if state_BHKV.dtype != jnp.float32:
        return f"the TPU kernel keeps the state in float32, not {state_BHKV.dtype}"
    if q_BSHK.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the TPU kernel takes bfloat16 and float32, not {q_BSHK.dtype}"
    if K % 128 or V % 128 or max(K, V) > 256:
        return f"the TPU kernel takes heads of 128 or 256 channels, not K={K} and V={V}"
    if S > MOST_TOKENS:
        return f"the TPU kernel takes up to {MOST_TOKENS} tokens, not {S}"
    if _heads_of_program(H) is None:
        return f"the TPU kernel takes up to {_MOST_HEADS} heads or a multiple of {_SUBLANES}, not {H}"
    return None


def decode(
    q_BSHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    slopes_H: jax.Array,
    state_BHKV: jax.Array,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, S, H, V] in v's dtype and the state after the last token, in the memory of the state before."""
    (B, S, H, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    G = _heads_of_program(H)
    tokens = lambda width: pl.BlockSpec((None, S, G, width), lambda b, g, *_: (b, 0, g, 0))  # noqa: E731
    state = pl.BlockSpec((None, G, K, V), lambda b, g, *_: (b, g, 0, 0))
    # Rows of 16-bit numbers come in pairs; the few that there are go in as fp32.
    q_BSHK, k_BSHK, values_BSHV = (x.astype(jnp.float32) for x in (q_BSHK, k_BSHK, v_BSHV))
    o_BSHV, state_BHKV = pl.pallas_call(
        functools.partial(_kernel, S, G),
        out_shape=[
            jax.ShapeDtypeStruct((B, S, H, V), jnp.float32),
            jax.ShapeDtypeStruct(state_BHKV.shape, jnp.float32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H // G),
            in_specs=[tokens(K), tokens(K), tokens(V), state],
            out_specs=[tokens(V), state],
        ),
        input_output_aliases={4: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=NAME,
    )(slopes_H.astype(jnp.float32), q_BSHK, k_BSHK, values_BSHV, state_BHKV)
    return o_BSHV.astype(v_BSHV.dtype), state_BHKV


def _kernel(S, G, slopes_H, q_SGK, k_SGK, v_SGV, state_GKV, o_SGV, new_state_GKV) -> None:
    K, V = state_GKV.shape[1:]
    first_head = pl.program_id(1) * G
    # Queries and keys as columns, each to be spread over the lanes of a state.
    q_KR, k_KR = (_columns(ref[...].reshape(S * G, K)) for ref in (q_SGK, k_SGK))
    for head in range(G):
        state_KV = state_GKV[head]
        decay_1V = jnp.exp(jnp.full((1, V), -slopes_H[first_head + head], jnp.float32))
        for token in range(S):
            column = slice(token * G + head, token * G + head + 1)
            state_KV = decay_1V * state_KV + k_KR[:, column] * v_SGV[token, head : head + 1, :]
            o_SGV[token, head : head + 1, :] = jnp.sum(q_KR[:, column] * state_KV, axis=0, keepdims=True)
        new_state_GKV[head] = state_KV


def _columns(rows_RK: jax.Array) -> jax.Array:
    """The transpose, of a whole square of lanes: narrower ones are not handled well by every compiler."""
    missing = -rows_RK.shape[0] % _LANES
    if missing:
        padding_RK = jnp.zeros((missing, rows_RK.shape[1]), rows_RK.dtype)
        rows_RK = jnp.concatenate([rows_RK, padding_RK], axis=0)
    return rows_RK.T


def _heads_of_program(heads: int) -> int | None:
    """Blocks of rows are whole tiles, or all of the rows."""
    if heads <= _MOST_HEADS:
        return heads
    return next((most for most in range(_MOST_HEADS, 0, -_SUBLANES) if heads % most == 0), None)
