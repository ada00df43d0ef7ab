"""Choosing the next token, against the distribution that it should follow."""

import jax
import jax.numpy as jnp
import numpy as np

from mmx.generate.sampling import sample

LOGITS = jnp.log(jnp.asarray([[0.1, 0.4, 0.3, 0.2]]))


def shares(temperature: float, top_p: float, count: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    draws = jax.jit(jax.vmap(lambda key: sample(LOGITS, key, jnp.float32(temperature), jnp.float32(top_p))))(keys)
    return np.bincount(np.asarray(draws)[:, 0], minlength=4) / count


def test_zero_temperature_takes_the_most_likely():
    assert shares(0.0, 1.0).tolist() == [0, 1, 0, 0]


def test_temperature_one_follows_the_distribution():
    np.testing.assert_allclose(shares(1.0, 1.0), [0.1, 0.4, 0.3, 0.2], atol=0.03)


def test_temperature_flattens():
    flat = np.sqrt([0.1, 0.4, 0.3, 0.2])
    np.testing.assert_allclose(shares(2.0, 1.0), flat / flat.sum(), atol=0.03)


def test_top_p_keeps_the_fewest_that_reach_it():
    np.testing.assert_allclose(shares(1.0, 0.6), [0, 4 / 7, 3 / 7, 0], atol=0.03)
    assert shares(1.0, 0.0).tolist() == [0, 1, 0, 0]
