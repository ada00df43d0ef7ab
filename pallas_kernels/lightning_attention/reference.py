"""Lightning attention as its definition: one token after another. The truth that every other form is tested against.

Shapes: B batch, S tokens, H heads, K key channels, V value channels.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.segments import document_starts


def lightning_attention_reference(
    q_BSHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHV: jax.Array,
    slopes_H: jax.Array,
    segment_ids_BS: jax.Array | None,
    initial_state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """S_t = exp(-slope) S_{t-1} + k_t v_t^T, o_t = q_t^T S_t, in the precision of the state.

    Returns o [B, S, H, V] in v's dtype and the state after the last token, [B, H, K, V].
    """
    dtype = initial_state_BHKV.dtype
    decay_H = jnp.exp(-slopes_H.astype(dtype))
    B, S = q_BSHK.shape[:2]
    starts_BS = jnp.zeros((B, S), bool) if segment_ids_BS is None else document_starts(segment_ids_BS)

    def step(state_BHKV, token):
        q_BHK, k_BHK, v_BHV, starts_B = token
        kept_BH = jnp.where(starts_B[:, None], 0, decay_H)
        state_BHKV = kept_BH[..., None, None] * state_BHKV + k_BHK[..., None] * v_BHV[..., None, :]
        return state_BHKV, jnp.einsum("bhk,bhkv->bhv", q_BHK, state_BHKV, precision="highest")

    tokens = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q_BSHK, k_BSHK, v_BSHV)]
    state_BHKV, o_SBHV = lax.scan(step, initial_state_BHKV, (*tokens, starts_BS.T))
    return jnp.moveaxis(o_SBHV, 0, 1).astype(v_BSHV.dtype), state_BHKV
