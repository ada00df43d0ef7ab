"""One step of lightning attention: constant time and memory, whatever came before.

Shapes: B batch, H heads, K key channels, V value channels.
"""

import jax
import jax.numpy as jnp


def lightning_attention_step(
    q_BHK: jax.Array, k_BHK: jax.Array, v_BHV: jax.Array, slopes_H: jax.Array, state_BHKV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Takes one token in and gives its output.

    Args:
      q_BHK, k_BHK, v_BHV: the token's query, key and value, any floating dtype.
      slopes_H: positive decay slopes.
      state_BHKV: state before the token, fp32.

    Returns:
      o [B, H, V] in v's dtype, and the state after the token in the state's dtype.
    """
    dtype = state_BHKV.dtype
    q_BHK, k_BHK, values_BHV = (x.astype(dtype) for x in (q_BHK, k_BHK, v_BHV))
    decay_H11 = jnp.exp(-slopes_H.astype(dtype))[:, None, None]
    state_BHKV = decay_H11 * state_BHKV + k_BHK[..., None] * values_BHV[..., None, :]
    o_BHV = jnp.sum(q_BHK[..., None] * state_BHKV, axis=-2)
    return o_BHV.astype(v_BHV.dtype), state_BHKV
