"""Blocked softmax attention against the whole score matrix, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.softmax_attention import SOFTMAX_RESIDUALS, softmax_attention, softmax_attention_step
from pallas_kernels.softmax_attention.blocked import softmax_attention_blocked
from pallas_kernels.softmax_attention.reference import softmax_attention_reference

B, H, G, K, V = 2, 4, 2, 8, 6

SEGMENTS = {
    "none": lambda S, rng: None,
    "random lengths": lambda S, rng: np.sort(rng.integers(0, 5, (B, S)), axis=1),
    "boundaries at block edges": lambda S, rng: np.tile(np.arange(S) // 8, (B, 1)),
    "documents of one token": lambda S, rng: np.tile(np.arange(S), (B, 1)),
    "ids that come back": lambda S, rng: rng.integers(0, 2, (B, S)),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("S", "block"), [(1, 256), (37, 8), (64, 8), (65, 8), (130, 16)])
def test_blocked_equals_reference(S, block, segments):
    rng = np.random.default_rng(0)
    segment_ids = SEGMENTS[segments](S, rng)
    arguments = [rng.normal(size=(B, S, heads, width)) for heads, width in ((H, K), (G, K), (G, V))]
    cotangent = rng.normal(size=(B, S, H, V))

    def value_and_gradients(function, *extra):
        loss = lambda q, k, v: jnp.sum(function(q, k, v, segment_ids, 0.3, *extra) * cotangent)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)

    got = value_and_gradients(softmax_attention_blocked, min(block, S))
    want = value_and_gradients(softmax_attention_reference)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_large_scores_stay_finite():
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(1, 40, H, K)), jnp.float32) * 1e4
    k = jnp.asarray(rng.normal(size=(1, 40, G, K)), jnp.float32) * 1e4
    segment_ids = jnp.asarray(np.arange(40)[None] // 11)
    loss = lambda q, k: jnp.sum(softmax_attention_blocked(q, k, k, segment_ids, 1.0, 8))  # noqa: E731
    for leaf in jax.tree.leaves(jax.value_and_grad(loss, argnums=(0, 1))(q, k)):
        assert np.isfinite(leaf).all()


def test_no_score_matrix_for_long_rows():
    # The program's temporaries stay far below the n x n scores of one head.
    S = 16384
    q = jax.ShapeDtypeStruct((1, S, 2, 16), jnp.float32)
    k = jax.ShapeDtypeStruct((1, S, 1, 16), jnp.float32)
    gradient = jax.grad(lambda q, k, v: jnp.sum(softmax_attention(q, k, v)), argnums=(0, 1, 2))
    memory = jax.jit(gradient).lower(q, k, k).compile().memory_analysis()
    assert memory.temp_size_in_bytes < S * S * 4 / 16


@pytest.mark.usefixtures("float64")
def test_steps_equal_the_whole():
    rng = np.random.default_rng(2)
    S = 10
    q, k, v = (rng.normal(size=(B, S, heads, width)) for heads, width in ((H, K), (G, K), (G, V)))
    want = softmax_attention(*(jnp.asarray(x) for x in (q, k, v)))
    for t in range(S):
        valid = np.tile(np.arange(S) <= t, (B, 1))
        got = softmax_attention_step(jnp.asarray(q[:, t]), jnp.asarray(k), jnp.asarray(v), jnp.asarray(valid))
        np.testing.assert_allclose(got, want[:, t], atol=1e-12)


def test_bfloat16_is_close_to_float32():
    rng = np.random.default_rng(3)
    arguments = [jnp.asarray(rng.normal(size=(B, 50, h, w)), jnp.bfloat16) for h, w in ((H, K), (G, K), (G, V))]
    got = softmax_attention(*arguments)
    assert got.dtype == jnp.bfloat16
    want = softmax_attention_reference(*(x.astype(jnp.float32) for x in arguments), None, K**-0.5)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


def test_a_policy_keeps_the_output_once_and_needs_no_second_pass():
    # Sizes that tell the arrays apart.
    S, H, G, K, V = 128, 2, 1, 64, 128
    q, k, v = (jnp.ones((1, S, heads, width)) for heads, width in ((H, K), (G, K), (G, V)))

    def layer(q, k, v):
        # What follows needs the output for its own gradient, too.
        return jnp.sin(softmax_attention(q, k, v))

    def kept(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        _, pullback = jax.vjp(jax.checkpoint(layer, policy=policy), q, k, v)
        exponentials = str(jax.make_jaxpr(pullback)(jnp.ones((1, S, H, V)))).count(" exp ")
        return sorted(x.size for x in jax.tree.leaves(pullback) if x.size in (S * H * V, S * H)), exponentials

    held, exponentials = kept(SOFTMAX_RESIDUALS)
    assert held == [S * H, S * H * V]
    # Without it, the backward pass begins with another forward pass.
    without, more_exponentials = kept()
    assert without == []
    assert more_exponentials > exponentials > 0


def test_mistakes_are_named():
    q, k = jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 4, 3, 8))
    with pytest.raises(ValueError, match="multiple of G"):
        softmax_attention(q, k, k)
    with pytest.raises(ValueError, match="one floating dtype"):
        softmax_attention(q, q, q.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="segment_ids"):
        softmax_attention(q, q, q, segment_ids_BS=jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="not one of"):
        softmax_attention(q, q, q, implementation="flash")
    with pytest.raises(NotImplementedError, match="takes bfloat16 or float16 and no segment_ids"):
        softmax_attention(q, q, q, implementation="cudnn")
