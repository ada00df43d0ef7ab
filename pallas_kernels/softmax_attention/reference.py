"""Causal softmax attention with the whole score matrix: the truth for short rows.

Shapes: B batch, S tokens, H query heads, G key-value heads, R = H / G query heads a key-value head, K key channels,
V value channels.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import document_runs


def softmax_attention_reference(
    q_BSHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, segment_ids_BS: jax.Array | None, scale: float
) -> jax.Array:
    """Attention in fp32 (float64 for float64 inputs), o [B, S, H, V] in v's dtype."""
    (B, S, H, K), G = q_BSHK.shape, k_BSGK.shape[2]
    dtype = jnp.promote_types(jnp.float32, q_BSHK.dtype)
    q_BSGRK = q_BSHK.astype(dtype).reshape(B, S, G, H // G, K)
    scores = scale * jnp.einsum("bsgrk,btgk->bgrst", q_BSGRK, k_BSGK.astype(dtype), precision="highest")
    allowed_BST = jnp.tril(jnp.ones((1, S, S), bool))
    if segment_ids_BS is not None:
        runs_BS = document_runs(segment_ids_BS)
        allowed_BST &= runs_BS[:, :, None] == runs_BS[:, None, :]
    scores = jnp.where(allowed_BST[:, None, None], scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1)
    o_BSGRV = jnp.einsum("bgrst,btgv->bsgrv", probabilities, v_BSGV.astype(dtype), precision="highest")
    return o_BSGRV.reshape(B, S, H, -1).astype(v_BSGV.dtype)
