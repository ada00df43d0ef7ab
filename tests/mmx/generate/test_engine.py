"""Generation with a cache against the whole model: every logit, then every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.generate import generate
from mmx.generate.engine import prefill_and_step
from mmx.model.text import init_params
from mmx.pretrained import Model
from tests.tiny import TINY, params, tiny, tokens

STACKS = {
    "hybrid": TINY,
    "lightning only": tiny(layer_pattern=("lightning",) * 3, num_layers=3),
    "softmax only": tiny(layer_pattern=("softmax",) * 3, num_layers=3),
}


def teacher_forced(config, weights, rows) -> jax.Array:
    return Model(config, weights).logits(rows)


@pytest.mark.parametrize("name", STACKS)
def test_prefill_and_cached_steps_equal_teacher_forcing(name):
    config = STACKS[name]
    weights = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))  # Logits of the size of 1.
    rows, prompt, padding = tokens(2, 45), 32, jnp.zeros(2, jnp.int32)
    want = teacher_forced(config, weights, rows)
    prefill, step = prefill_and_step(config)
    logits, cache = prefill(weights, jnp.asarray(rows[:, :prompt]), padding, 128)
    np.testing.assert_allclose(logits, want[:, prompt - 1], atol=1e-5, rtol=0)
    for place in range(prompt, rows.shape[1]):
        logits, cache = step(weights, jnp.asarray(rows[:, place]), cache, jnp.int32(place), padding)
        np.testing.assert_allclose(logits, want[:, place], atol=1e-5, rtol=0)


def uncached(config, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation that computes everything anew for each token."""
    row = list(prompt)
    for _ in range(count):
        # Padding behind a causal model changes nothing, and keeps one compiled shape.
        padded = row + [0] * (len(prompt) + count - len(row))
        row.append(int(jnp.argmax(teacher_forced(config, params(config), np.asarray([padded]))[0, len(row) - 1])))
    return row[len(prompt) :]


def test_cached_equals_uncached():
    prompt = tokens(1, 7)[0].tolist()
    [new] = generate(TINY, params(), [prompt], max_new_tokens=9)
    assert new == uncached(TINY, prompt, 9)


def test_rows_of_different_lengths_do_not_see_each_other():
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (1, 5, 33)]
    together = generate(TINY, params(), prompts, max_new_tokens=6)
    alone = [generate(TINY, params(), [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone


def test_stops():
    prompt = tokens(1, 7)[0].tolist()
    [free] = generate(TINY, params(), [prompt], max_new_tokens=8)
    stop = free[3]
    seen = []
    [stopped] = generate(TINY, params(), [prompt], max_new_tokens=8, stop_ids=[stop], on_tokens=seen.append)
    assert stopped == free[: free.index(stop) + 1]
    assert [int(row[0]) for row in seen] == stopped


def test_seed_decides_the_sample():
    prompt = [[1, 2, 3]]
    samples = [generate(TINY, params(), prompt, max_new_tokens=12, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "at least one token"), ([[]], "at least one token"), ([[61]], "outside of the vocabulary of 61")],
)
def test_wrong_prompts(prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(TINY, params(), prompts, max_new_tokens=1)


def test_model_returns_prompt_and_continuation():
    model = Model(TINY, params())
    one = model.generate([1, 2, 3], max_new_tokens=4)
    assert one.shape == (7,)
    assert one[:3].tolist() == [1, 2, 3]
    several = model.generate(np.asarray([[1, 2, 3], [4, 5, 6]]), max_new_tokens=4)
    assert several.shape == (2, 7)
    assert several[0].tolist() == one.tolist()
    uneven = model.generate([[1, 2, 3], [4]], max_new_tokens=4)
    assert [len(row) for row in uneven] == [7, 5]
    assert uneven[0] == one.tolist()
