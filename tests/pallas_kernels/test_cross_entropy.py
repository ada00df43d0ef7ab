"""Blocked cross-entropy against all logits at once, values and gradients; and its memory on TPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.aot import CHIPS, compile_for_chip, missing_compiler
from pallas_kernels.cross_entropy import cross_entropy
from pallas_kernels.cross_entropy.blocked import cross_entropy_blocked
from pallas_kernels.cross_entropy.reference import cross_entropy_reference


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("T", "block"), [(1, 16), (37, 8), (64, 64), (64, 16)])
def test_blocked_equals_reference(T, block):
    rng = np.random.default_rng(0)
    x, head = rng.normal(size=(T, 6)), rng.normal(size=(50, 6))
    targets, weights = rng.integers(0, 50, T), rng.random(T) * (rng.random(T) > 0.2)

    def value_and_gradients(function, *extra):
        loss = lambda x, head, weights: 3 * function(x, head, targets, weights, jnp.float64, *extra)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, head, weights)

    got = value_and_gradients(cross_entropy_blocked, block)
    want = value_and_gradients(cross_entropy_reference)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    plain = jax.jit(lambda: cross_entropy_blocked(x, head, targets, weights, jnp.float64, block))()
    np.testing.assert_allclose(3 * plain, want[0], rtol=1e-12)


def test_memory_stays_below_the_logits():
    # 4,096 tokens and 50,000 words are 820 MB of logits; the program, gradients included, takes a tenth.
    T, V, D = 4096, 50_000, 16
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((T, D), jnp.float32), ((V, D), jnp.float32), ((T,), jnp.int32), ((T,), jnp.float32))
    ]
    memory = jax.jit(jax.grad(cross_entropy, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * T * V / 8


def test_rounded_logits():
    rng = np.random.default_rng(1)
    x, head = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((20, 8), (30, 8)))
    targets, weights = jnp.asarray(rng.integers(0, 30, 20)), jnp.ones(20)
    for logits_dtype in (jnp.float32, jnp.bfloat16):
        got, want = (
            cross_entropy(x, head, targets, weights, logits_dtype=logits_dtype, implementation=implementation)
            for implementation in ("blocked", "reference")
        )
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_mistakes_are_named():
    x, head, targets = jnp.zeros((4, 3)), jnp.zeros((5, 3)), jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match="do not fit"):
        cross_entropy(x, head, targets, jnp.zeros(3))
    with pytest.raises(ValueError, match="not one of"):
        cross_entropy(x, head, targets, jnp.zeros(4), implementation="fused")


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_no_logits_of_all_tokens_on_tpu():
    # The released model's head on one v5p chip.
    T, D, V = 8192, 6144, 200_064
    shape = jax.ShapeDtypeStruct
    x, head = shape((T, D), jnp.bfloat16), shape((V, D), jnp.bfloat16)
    targets, weights = shape((T,), jnp.int32), shape((T,), jnp.float32)
    gradient = jax.value_and_grad(cross_entropy, argnums=(0, 1))
    compiled = compile_for_chip(CHIPS["v5p"], gradient, x, head, targets, weights)
    # The head's gradient is summed in fp32, whatever the number of tokens. The rest is blocks of logits, x's gradient.
    rest = compiled.memory_analysis().temp_size_in_bytes - 4 * V * D
    assert rest < 4 * T * V / 8
    assert max(int(rows) for rows in re.findall(rf"\[(\d+),{V}\]", compiled.as_text())) < T / 16
