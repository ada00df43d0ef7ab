"""Choosing the next token. Shapes: B batch, V vocabulary."""

import jax
import jax.numpy as jnp


def sample(logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: fp32.
      key: of the random numbers.
      temperature: 0 takes the most likely token.
      top_p: smallest mass of most likely tokens that is sampled from; 1 takes all.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    order_BV = jnp.argsort(-scaled_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=-1)
    mass_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays if the mass in front of it does not yet reach top_p: the first always does.
    kept_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV < top_p
    place_B = jax.random.categorical(key, jnp.where(kept_BV, sorted_BV, -jnp.inf), axis=-1)
    sampled_B = jnp.take_along_axis(order_BV, place_B[:, None], axis=-1)[:, 0]
    return jnp.where(temperature > 0, sampled_B, greedy_B).astype(jnp.int32)
