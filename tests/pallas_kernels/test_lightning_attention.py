"""Every form of lightning attention against the token recurrence, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lightning_attention import (
    head_slopes,
    layer_factor,
    layer_slopes,
    lightning_attention,
    lightning_attention_step,
)
from pallas_kernels.lightning_attention.blocked import lightning_attention_blocked
from pallas_kernels.lightning_attention.reference import lightning_attention_reference

B, H, K, V = 2, 3, 8, 5
# The strongest slope of the released model, a middling one and one that hardly forgets.
SLOPES = (0.917, 0.1, 0.0004)

# (tokens, block, blocks in a group)
TILINGS = {
    "one token": (1, 256, 4),
    "shorter than a block": (5, 8, 4),
    "whole blocks": (64, 8, 4),
    "one token over": (65, 8, 4),
    "ragged group": (100, 8, 5),
    "one block a group": (37, 8, 1),
    "one group": (100, 16, 100),
    "blocks of 256": (300, 256, 1),
}
SEGMENTS = {
    "none": lambda S, rng: None,
    "random lengths": lambda S, rng: np.sort(rng.integers(0, 5, (B, S)), axis=1),
    "boundaries at block edges": lambda S, rng: np.tile(np.arange(S) // 8, (B, 1)),
    "documents of one token": lambda S, rng: np.tile(np.arange(S), (B, 1)),
    "ids that come back": lambda S, rng: rng.integers(0, 2, (B, S)),
}


def inputs(rng, S, dtype=np.float64):
    q, k = (rng.normal(size=(B, S, H, K)).astype(dtype) for _ in range(2))
    return q, k, rng.normal(size=(B, S, H, V)).astype(dtype), rng.normal(size=(B, H, K, V)).astype(dtype)


def value_and_gradients(function, arguments, cotangents):
    def loss(*arguments):
        outputs = function(*arguments)
        return sum(jnp.sum(o * c) for o, c in zip(outputs, cotangents, strict=True)), outputs

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*arguments)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("tiling", TILINGS)
def test_blocked_equals_recurrence(tiling, segments):
    rng = np.random.default_rng(0)
    S, block, group = TILINGS[tiling]
    segment_ids = SEGMENTS[segments](S, rng)
    *arguments, state = inputs(rng, S)
    cotangents = rng.normal(size=(B, S, H, V)), rng.normal(size=(B, H, K, V))
    slopes = jnp.asarray(SLOPES)

    def blocked(q, k, v, state):
        return lightning_attention_blocked(q, k, v, slopes, segment_ids, state, block, group)

    def reference(q, k, v, state):
        return lightning_attention_reference(q, k, v, slopes, segment_ids, state)

    got = value_and_gradients(blocked, (*arguments, state), cotangents)
    want = value_and_gradients(reference, (*arguments, state), cotangents)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("implementation", ["auto", "blocked", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_op_in_training_precisions(implementation, dtype):
    rng = np.random.default_rng(1)
    S = 70
    q, k, v, state = inputs(rng, S)
    segment_ids = jnp.asarray(np.sort(rng.integers(0, 4, (B, S)), axis=1))
    narrow = [jnp.asarray(x, dtype) for x in (q, k, v)]
    o, final = lightning_attention(
        *narrow,
        jnp.asarray(SLOPES, jnp.float32),
        segment_ids_BS=segment_ids,
        initial_state_BHKV=jnp.asarray(state, jnp.float32),
        implementation=implementation,
    )
    assert o.dtype == dtype
    assert final.dtype == jnp.float32
    wide = [np.asarray(x, np.float64) for x in narrow]
    want_o, want_final = recurrence(*wide, np.asarray(SLOPES), np.asarray(segment_ids), state)
    # Operands of the products are rounded to the inputs' dtype; accumulation and state are fp32.
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    scale = np.abs(want_o).max()
    assert np.abs(np.asarray(o, np.float64) - want_o).max() < tolerance * scale
    assert np.abs(np.asarray(final, np.float64) - want_final).max() < tolerance * np.abs(want_final).max()


def recurrence(q, k, v, slopes, segment_ids, state):
    """The definition once more, in NumPy, for a check that shares no code with the reference."""
    o = np.zeros(v.shape)
    state = state.copy()
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            if t and segment_ids[b, t] != segment_ids[b, t - 1]:
                state[b] = 0
            for h in range(q.shape[2]):
                state[b, h] = np.exp(-slopes[h]) * state[b, h] + np.outer(k[b, t, h], v[b, t, h])
                o[b, t, h] = q[b, t, h] @ state[b, h]
    return o, state


def test_strong_decay_does_not_overflow():
    # exp(+0.917 * 256) overflows fp32: a factored decay would show infinities here.
    rng = np.random.default_rng(2)
    q, k, v, state = (jnp.asarray(x) for x in inputs(rng, 1024, np.float32))
    slopes = jnp.full((H,), 0.917, jnp.float32)

    def total(q, k, v, state):
        o, final = lightning_attention_blocked(q, k, v, slopes, None, state, 256, 2)
        return jnp.sum(o) + jnp.sum(final)

    for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(q, k, v, state)):
        assert np.isfinite(leaf).all()


@pytest.mark.usefixtures("float64")
def test_state_carries_a_row_over_a_cut():
    rng = np.random.default_rng(3)
    q, k, v, state = inputs(rng, 50)
    run = functools.partial(lightning_attention, slopes_H=jnp.asarray(SLOPES))
    segment_ids = np.repeat([[1, 2, 3]], B, 0).repeat([20, 20, 10], axis=1)
    whole, final = run(q, k, v, segment_ids_BS=jnp.asarray(segment_ids), initial_state_BHKV=state)
    parts = []
    for cut in (slice(0, 33), slice(33, 50)):
        o, state = run(
            *(x[:, cut] for x in (q, k, v)), segment_ids_BS=jnp.asarray(segment_ids[:, cut]), initial_state_BHKV=state
        )
        parts.append(o)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-12)
    np.testing.assert_allclose(state, final, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_steps_equal_the_whole():
    rng = np.random.default_rng(4)
    q, k, v, state = inputs(rng, 12)
    slopes = jnp.asarray(SLOPES)
    want, final = lightning_attention(q, k, v, slopes, initial_state_BHKV=state)
    for t in range(12):
        o, state = lightning_attention_step(q[:, t], k[:, t], v[:, t], slopes, state)
        np.testing.assert_allclose(o, want[:, t], atol=1e-12)
    np.testing.assert_allclose(state, final, atol=1e-12)


def test_backward_keeps_few_states():
    # Residuals grow with n / (block * group) states, not with n / block or n.
    S, block, group = 4096, 32, 16
    q = jnp.zeros((1, S, 1, K), jnp.float32)
    state = jnp.zeros((1, 1, K, K), jnp.float32)
    slopes = jnp.ones((1,), jnp.float32)
    _, pullback = jax.vjp(
        lambda q, k, v: lightning_attention_blocked(q, k, v, slopes, None, state, block, group), q, q, q
    )
    states = [x for x in jax.tree.leaves(pullback) if x.ndim == 5]
    assert [x.shape[0] for x in states] == [S // (block * group)]


def test_slopes_follow_the_released_code():
    np.testing.assert_allclose(head_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(head_slopes(64)[[0, 63]], [2**-0.125, 2**-8])
    # No power of two: slopes of four heads, then every second of eight.
    np.testing.assert_allclose(head_slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    assert head_slopes(1).shape == (1,)
    assert layer_factor(0, 80) == pytest.approx(1 + 1e-5)
    assert layer_factor(79, 80) == pytest.approx(1e-5)
    assert layer_factor(0, 1) == pytest.approx(1 + 1e-5)
    np.testing.assert_allclose(layer_slopes(64, 40, 80), head_slopes(64) * (1 - 40 / 79 + 1e-5), rtol=1e-6)


def test_slopes_by_the_rule_of_transformers():
    np.testing.assert_allclose(head_slopes(6, "transformers"), 2.0 ** (-8 / 6 * np.arange(1, 7)), rtol=1e-6)
    np.testing.assert_array_equal(head_slopes(16, "transformers"), head_slopes(16))
    assert layer_factor(0, 1, "transformers") == pytest.approx(1 + 1e-5)
    for layer in range(79):
        assert layer_factor(layer, 80, "transformers") == pytest.approx(layer_factor(layer, 80), rel=1e-5)
    assert layer_factor(79, 80, "transformers") == pytest.approx(1.0127e-5, rel=1e-4)
    with pytest.raises(ValueError, match="slope rule 'alibi' is neither"):
        layer_slopes(4, 0, 2, "alibi")


def test_mistakes_are_named():
    q = jnp.zeros((1, 4, 2, 8))
    slopes = jnp.ones(2)
    with pytest.raises(ValueError, match="k has shape"):
        lightning_attention(q, q[:, :3], q, slopes)
    with pytest.raises(ValueError, match="slopes has shape"):
        lightning_attention(q, q, q, jnp.ones(3))
    with pytest.raises(ValueError, match="one floating dtype"):
        lightning_attention(q, q.astype(jnp.bfloat16), q, slopes)
    with pytest.raises(ValueError, match="not one of"):
        lightning_attention(q, q, q, slopes, implementation="fast")
    with pytest.raises(NotImplementedError, match="not written yet"):
        lightning_attention(q, q, q, slopes, implementation="gpu")
