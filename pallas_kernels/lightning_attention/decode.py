"""Single steps of lightning attention: constant time and memory, whatever came before.

Shapes: B batch, S tokens, H heads, K key channels, V value channels.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention import tpu_decode
from pallas_kernels.lightning_attention.op import lightning_attention
from pallas_kernels.platform import target_platform, unsplit

DECODE_IMPLEMENTATIONS = ("auto", "plain", "tpu", "tpu_interpret")


def lightning_attention_step(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    slopes_H: jax.Array,
    state_BHKV: jax.Array,
    *,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Takes one token in and gives its output.

    Args:
      q_BHK, k_BHK, v_BHV: the token's query, key and value, any floating dtype.
      slopes_H: positive decay slopes.
      state_BHKV: state before the token, fp32. Donate it, and the TPU kernel updates it in place.
      implementation: "auto", or one of ``DECODE_IMPLEMENTATIONS`` to force it.

    Returns:
      o [B, H, V] in v's dtype, and the state after the token in the state's dtype.

    Raises:
      ValueError: if the implementation is unknown.
      NotImplementedError: if a forced implementation cannot run, with the reason.
    """
    token = (x[:, None] for x in (q_BHK, k_BHK, v_BHV))
    o_BSHV, state_BHKV = lightning_attention_extend(*token, slopes_H, state_BHKV, implementation=implementation)
    return o_BSHV[:, 0], state_BHKV


def lightning_attention_extend(
    q_BSHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    slopes_H: jax.Array,
    state_BHKV: jax.Array,
    *,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Takes several tokens of one document in: a draft to verify, or the next piece of a prompt.

    The same as ``lightning_attention`` with an initial state, by a kernel of its own for few tokens on TPU. Arguments
    and errors as in ``lightning_attention_step``, with S tokens.

    Returns:
      o [B, S, H, V] in v's dtype, and the state after the last token in the state's dtype.
    """
    if implementation not in DECODE_IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(DECODE_IMPLEMENTATIONS)}")
    operands = (q_BSHK, k_BSHK, v_BSHV, slopes_H)
    reason = tpu_decode.unsupported(q_BSHK, v_BSHV, state_BHKV)
    if implementation == "auto":
        implementation = "tpu" if reason is None and target_platform() == "tpu" and unsplit() else "plain"
    if implementation != "plain":
        if implementation == "tpu" and reason is None and target_platform() != "tpu":
            reason = f"the code is traced for {target_platform()}; 'tpu_interpret' simulates the kernel on a CPU"
        if reason is not None:
            raise NotImplementedError(f"implementation={implementation!r} cannot run: {reason}")
        interpret = pltpu.InterpretParams(uninitialized_memory="nan") if implementation == "tpu_interpret" else False
        return tpu_decode.decode(*operands, state_BHKV, interpret)
    if q_BSHK.shape[1] == 1:
        o_BHV, state_BHKV = _step(*(x[:, 0] for x in operands[:3]), slopes_H, state_BHKV)
        return o_BHV[:, None], state_BHKV
    return lightning_attention(*operands, initial_state_BHKV=state_BHKV)


def _step(q_BHK, k_BHK, v_BHV, slopes_H, state_BHKV):
    dtype = state_BHKV.dtype
    q_BHK, k_BHK, values_BHV = (x.astype(dtype) for x in (q_BHK, k_BHK, v_BHV))
    decay_H11 = jnp.exp(-slopes_H.astype(dtype))[:, None, None]
    state_BHKV = decay_H11 * state_BHKV + k_BHK[..., None] * values_BHV[..., None, :]
    o_BHV = jnp.sum(q_BHK[..., None] * state_BHKV, axis=-2)
    return o_BHV.astype(v_BHV.dtype), state_BHKV
