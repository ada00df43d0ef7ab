"""Cross-entropy with all logits at once: the truth for small inputs.

Shapes: T tokens, D hidden channels, V vocabulary.
"""

import jax
import jax.numpy as jnp


def cross_entropy_reference(
    x_TD: jax.Array, head_VD: jax.Array, targets_T: jax.Array, weights_T: jax.Array, logits_dtype: jnp.dtype
) -> jax.Array:
    """Weighted sum of the tokens' negative log-likelihoods, in fp32 or wider."""
    wide = jnp.promote_types(jnp.float32, x_TD.dtype)
    logits_TV = jnp.einsum("td,vd->tv", x_TD, head_VD, preferred_element_type=wide, precision="highest")
    log_p_TV = jax.nn.log_softmax(logits_TV.astype(logits_dtype).astype(wide), axis=-1)
    return -jnp.sum(weights_T * jnp.take_along_axis(log_p_TV, targets_T[:, None], axis=-1)[:, 0])
