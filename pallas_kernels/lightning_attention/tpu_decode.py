"""A few steps of lightning attention on TPU: the state is read and written once, in place, and bounds the time.

Of one token, outer product, decay and reduction are elementwise work that hides behind the memory; a matrix unit would
stand idle. Several tokens are a chunk, ``tpu_decode_several.py``. Shapes: B batch, S tokens (few), H heads, G heads of
a program, K key channels, V value channels, R rows, R = S x G.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention import tpu_decode_several

NAME = "lightning_attention_decode"
# More tokens than these are less work as a chunk of the forward kernel.
MOST_TOKENS = 8
_SUBLANES = 8
_LANES = 128
_MOST_HEADS = 16
# All chips let a kernel have 16 MiB of VMEM; states may take this much of them.
_MOST_STATE_BYTES = 12 * 2**20
_HIGH_BITS = 0xFFFF0000
_F32 = jnp.float32


def unsupported(q_BSHK: jax.Array, v_BSHV: jax.Array, state_BHKV: jax.Array) -> str | None:
    """Why the kernel, as far as it is tested, does not take these operands, or None."""
    (_, S, H, K), V = q_BSHK.shape, v_BSHV.shape[-1]
    if state_BHKV.dtype != _F32:
        return f"the TPU kernel keeps the state in float32, not {state_BHKV.dtype}"
    if q_BSHK.dtype not in (jnp.bfloat16, _F32):
        return f"the TPU kernel takes bfloat16 and float32, not {q_BSHK.dtype}"
    if K % 128 or V % 128 or max(K, V) > 256:
        return f"the TPU kernel takes heads of 128 or 256 channels, not K={K} and V={V}"
    if S > MOST_TOKENS:
        return f"the TPU kernel takes up to {MOST_TOKENS} tokens, not {S}"
    if _heads_of_program(H, K, V) is None:
        most = _most_heads(K, V)
        return f"the TPU kernel takes up to {most} heads of this size or a multiple of {_SUBLANES}, not {H}"
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
    G = _heads_of_program(H, K, V)
    tokens = lambda width: pl.BlockSpec((None, S, G, width), lambda b, g, *_: (b, 0, g, 0))  # noqa: E731
    state = pl.BlockSpec((None, G, K, V), lambda b, g, *_: (b, g, 0, 0))
    if S == 1:
        body, scratch = functools.partial(_one_token, G), [pltpu.VMEM((1, G, V), _F32)] * 2
    else:
        body, scratch = functools.partial(tpu_decode_several.tokens, S, G), tpu_decode_several.scratch(S, G, K, V)
    return pl.pallas_call(
        body,
        out_shape=[
            jax.ShapeDtypeStruct((B, S, H, V), v_BSHV.dtype),
            jax.ShapeDtypeStruct(state_BHKV.shape, _F32),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, H // G),
            in_specs=[tokens(K), tokens(K), tokens(V), state],
            out_specs=[tokens(V), state],
            scratch_shapes=scratch,
        ),
        input_output_aliases={4: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=NAME,
    )(slopes_H.astype(_F32), q_BSHK, k_BSHK, v_BSHV, state_BHKV)


def _one_token(G, slopes_H, q_SGK, k_SGK, v_SGV, state_GKV, o_SGV, new_state_GKV, values_SGV, outputs_SGV) -> None:
    first_head = pl.program_id(1) * G
    V = state_GKV.shape[2]
    # Rows of 16-bit numbers come in pairs; single ones are read and written as fp32.
    values_SGV[...] = v_SGV[...].astype(_F32)
    columns = _columns(q_SGK[0], k_SGK[0])
    for head in range(G):
        q_KV, k_KV = columns(head, V)
        decay_1V = jnp.exp(jnp.full((1, V), -slopes_H[first_head + head], _F32))
        state_KV = decay_1V * state_GKV[head] + k_KV * values_SGV[0, head : head + 1, :]
        outputs_SGV[0, head : head + 1, :] = jnp.sum(q_KV * state_KV, axis=0, keepdims=True)
        new_state_GKV[head] = state_KV
    o_SGV[...] = outputs_SGV[...].astype(o_SGV.dtype)


def _columns(q_GK: jax.Array, k_GK: jax.Array) -> Callable[[int, int], tuple[jax.Array, jax.Array]]:
    """What gives a head's query and key as columns, each spread over so many lanes.

    Spreading is slow and decides the kernel's time on TPU7x: a query and a key of 16 bits travel as one word.
    """
    K = q_GK.shape[1]
    spread = lambda x_KG, head, width: jnp.broadcast_to(x_KG[:, head : head + 1], (K, width))  # noqa: E731
    queries_GK, keys_GK = q_GK.astype(_F32), k_GK.astype(_F32)
    if not q_GK.dtype == k_GK.dtype == jnp.bfloat16:
        both_KG = _transpose(queries_GK), _transpose(keys_GK)
        return lambda head, width: tuple(spread(x_KG, head, width) for x_KG in both_KG)
    bits = lambda x: lax.bitcast_convert_type(x, jnp.uint32)  # noqa: E731
    words_KG = _transpose(bits(queries_GK) | bits(keys_GK) >> 16)

    def columns(head: int, width: int) -> tuple[jax.Array, jax.Array]:
        words_KV = spread(words_KG, head, width)
        query, key = words_KV & jnp.uint32(_HIGH_BITS), words_KV << 16
        return lax.bitcast_convert_type(query, _F32), lax.bitcast_convert_type(key, _F32)

    return columns


def _transpose(rows_GK: jax.Array) -> jax.Array:
    """The transpose, of a whole square of lanes: narrower ones are not handled well by every compiler."""
    missing = -rows_GK.shape[0] % _LANES
    if missing:
        padding_GK = jnp.zeros((missing, rows_GK.shape[1]), rows_GK.dtype)
        rows_GK = jnp.concatenate([rows_GK, padding_GK], axis=0)
    return rows_GK.T


def _heads_of_program(heads: int, K: int, V: int) -> int | None:
    """Blocks of rows are whole tiles, or all of the rows."""
    most = _most_heads(K, V)
    if heads <= most:
        return heads
    return next((group for group in range(most // _SUBLANES * _SUBLANES, 0, -_SUBLANES) if heads % group == 0), None)


def _most_heads(K: int, V: int) -> int:
    # Two copies each of the state before and after: one is worked on while the other moves.
    return min(_MOST_HEADS, _MOST_STATE_BYTES // (4 * 4 * K * V))
