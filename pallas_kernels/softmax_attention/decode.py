"""One query a row against cached keys and values.

Shapes: B batch, T cache slots, H query heads, G key-value heads, R = H / G, K key channels, V value channels.
"""

import jax
import jax.numpy as jnp


def softmax_attention_step(
    q_BHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    valid_BT: jax.Array,
    *,
    scale: float | None = None,
) -> jax.Array:
    """Attention of one token, whose own key and value are already in the cache.

    Args:
      q_BHK: the token's query.
      k_BTGK, v_BTGV: the cache.
      valid_BT: which slots the token may see, bool; at least one a row.
      scale: of the scores, 1/sqrt(K) if None.

    Returns:
      o [B, H, V] in v's dtype.
    """
    (B, H, K), G = q_BHK.shape, k_BTGK.shape[2]
    dtype = jnp.promote_types(jnp.float32, q_BHK.dtype)
    scale = K**-0.5 if scale is None else scale
    q_BGRK = (q_BHK * scale).astype(k_BTGK.dtype).reshape(B, G, H // G, K)
    scores = jnp.einsum("bgrk,btgk->bgrt", q_BGRK, k_BTGK, preferred_element_type=dtype)
    scores = jnp.where(valid_BT[:, None, None], scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BTGV.dtype)
    o_BGRV = jnp.einsum("bgrt,btgv->bgrv", probabilities, v_BTGV, preferred_element_type=dtype)
    return o_BGRV.reshape(B, H, -1).astype(v_BTGV.dtype)
