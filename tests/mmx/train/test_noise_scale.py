"""The gradient noise scale, on a problem whose answer is known and against gradients taken one by one."""

import functools

import jax
import numpy as np
import pytest

from mmx.train.noise_scale import NoiseScale, gradient_noise
from mmx.train.step import token_sum_gradient
from tests.mmx.train.test_step import compiled_step, fresh_state, packed_batch
from tests.tiny import params, tiny

SIZE, SQUARE, VARIANCE = 50, 2.0, 800.0  # Of the gradient; |G|^2 and tr(S): the noise scale is 400 tokens.


def noisy_sums(rng, tokens: np.ndarray) -> np.ndarray:
    """Sums of the gradients of single tokens, drawn around a true one, in micro-batches of so many tokens each."""
    true = np.full(SIZE, np.sqrt(SQUARE / SIZE))
    spread = np.sqrt(VARIANCE / SIZE)
    # The sum over n tokens has n times the variance of one.
    return tokens[:, None] * true + spread * np.sqrt(tokens)[:, None] * rng.standard_normal((len(tokens), SIZE))


@pytest.mark.parametrize(
    "tokens", [[64] * 8, [256, 16, 3, 100, 30, 64, 0, 40], [300, 300]], ids=["equal", "unequal", "two"]
)
def test_known_noise_scale(tokens):
    rng, tokens = np.random.default_rng(0), np.asarray(tokens, np.float64)
    scale = NoiseScale(memory=1000)
    for _ in range(4000):
        sums = noisy_sums(rng, tokens)
        parts = (sums**2).sum(1) / np.maximum(tokens, 1)
        whole = (sums.sum(0) ** 2).sum()
        noise = gradient_noise(parts.sum(), whole, tokens.sum(), (tokens > 0).sum())
        scale.observe(float(noise.square), float(noise.variance))
    assert scale.tokens == pytest.approx(VARIANCE / SQUARE, rel=0.05)


def test_step_reports_what_its_micro_batches_say():
    # Micro-batches have different numbers of targets, and clipping, which comes afterwards, bites.
    config, batch = tiny(aux_loss_coefficient=0.0), packed_batch()
    state = fresh_state(config)._replace(params=params(config))
    noise = compiled_step(config, micro_batches=4, clip_norm=1e-3)(state, batch, 1e-2)[1].noise
    gradient = jax.jit(functools.partial(token_sum_gradient, config, 1))
    parts = [gradient(state.params, jax.tree.map(lambda x, a=a: x[a::4], batch)) for a in range(4)]
    tokens = np.asarray([part.sums.tokens for part in parts])
    vectors = np.asarray([np.concatenate([np.ravel(x) for x in jax.tree.leaves(part.grads)]) for part in parts])
    # tr(S) from the spread of the parts' means around the mean of all, in its other form.
    mean = vectors.sum(0) / tokens.sum()
    spread = (tokens * ((vectors / tokens[:, None] - mean) ** 2).sum(1)).sum() / (len(tokens) - 1)
    np.testing.assert_allclose(noise.variance, spread, rtol=1e-3)
    np.testing.assert_allclose(noise.square, (mean**2).sum() - spread / tokens.sum(), rtol=1e-3)


def test_state_goes_on_and_steps_without_a_finite_gradient_do_not_count():
    scale = NoiseScale()
    assert scale.tokens is None
    scale.observe(1.0, 30.0)
    scale.observe(float("nan"), 30.0)
    assert scale.tokens == pytest.approx(30)
    again = NoiseScale(**scale.state())
    for one in (scale, again):
        one.observe(-2.0, 50.0)
    assert again == scale
    assert scale.tokens is None  # Noise hides the signal.
