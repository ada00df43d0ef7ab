"""Counts of parameters and FLOPs against the published numbers and the report's Table 1."""

import dataclasses

import jax
import pytest

from configs.minimax_text_01 import get_config
from mmx.config import LIGHTNING, SOFTMAX, ModelConfig, count_parameters, forward_flops, training_flops
from mmx.model.text import init_params
from tests.tiny import TINY, tiny

RELEASED = get_config().model


def test_released_model_has_the_published_size():
    counts = count_parameters(RELEASED)
    assert counts.total == 456_089_655_296
    assert counts.active == pytest.approx(45.94e9, rel=1e-3)
    assert counts.active == 45_944_920_064


@pytest.mark.parametrize("config", [TINY, tiny(tie_embeddings=True), RELEASED], ids=["tiny", "tied", "released"])
def test_count_equals_the_arrays(config):
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count_parameters(config).total


def dense(kind: str, layers: int, width: int, heads: int) -> ModelConfig:
    """A model of Table 1: one expert of 8/3 of the width, so 8 d^2 parameters, and as many key-value heads as heads."""
    return ModelConfig(
        vocab_size=1,
        hidden_size=width,
        num_layers=layers,
        layer_pattern=(kind,) * layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        num_experts=1,
        experts_per_token=1,
        expert_hidden_size=8 * width // 3,
    )


def body_flops(config: ModelConfig, tokens: int) -> int:
    """Training FLOPs without head and router, which Table 1 leaves out."""
    flops = forward_flops(config, [tokens])
    return 3 * (flops.total - flops.head - flops.router)


def test_table_1_softmax():
    l, d, h, n = 16, 768, 8, 2048  # noqa: E741  The report's letters.
    config = dense(SOFTMAX, l, d, h)
    counts = count_parameters(config)
    assert counts.softmax_attention + counts.experts == 12 * l * d**2
    # Table 1 counts attention without the causal mask, n keys a query instead of (n + 1) / 2; its last term, 5/(18 d),
    # is the elementwise work that we leave out.
    scores = forward_flops(config, [n]).softmax_scores
    without_mask = body_flops(config, n) + 3 * (scores * 2 * n / (n + 1) - scores)
    assert without_mask == pytest.approx(72 * n * l * d**2 * (1 + n / (6 * d)))


def test_table_1_lightning():
    l, d, h, n = 16, 768, 8, 2048  # noqa: E741
    config = dense(LIGHTNING, l, d, h)
    counts = count_parameters(config)
    # Table 1's study models have a low-rank gate of 2 d^2 / h parameters; the released model's gate has d^2.
    gate = d**2 - 2 * d**2 // h
    norms = l * d
    assert counts.lightning_attention - norms + counts.experts - l * gate == 12 * l * d**2 + 2 * l * d**2 // h
    # It counts scores within blocks as long as a head is wide, 4 (d/h)^2 a head and token, beside the recurrence.
    flops = body_flops(config, n) - 6 * n * l * gate + 3 * n * l * h * 4 * (d // h) ** 2
    assert flops == pytest.approx(72 * n * l * d**2 * (1 + 1 / (2 * h)))


def test_table_1_hybrid_is_their_mixture():
    l, d, h, n = 16, 768, 8, 2048  # noqa: E741
    hybrid = dataclasses.replace(dense(LIGHTNING, l, d, h), layer_pattern=((LIGHTNING,) * 7 + (SOFTMAX,)) * 2)
    pure = {kind: body_flops(dense(kind, l, d, h), n) for kind in (LIGHTNING, SOFTMAX)}
    assert body_flops(hybrid, n) == pytest.approx(7 / 8 * pure[LIGHTNING] + 1 / 8 * pure[SOFTMAX])


def test_packing_saves_attention_only():
    one, packed = forward_flops(RELEASED, [8192]), forward_flops(RELEASED, [4096, 4096])
    pairs = lambda n: n * (n + 1) // 2  # noqa: E731
    assert packed.softmax_scores / one.softmax_scores == pytest.approx(2 * pairs(4096) / pairs(8192))
    assert dataclasses.replace(packed, softmax_scores=0) == dataclasses.replace(one, softmax_scores=0)
    assert training_flops(RELEASED, [8192]) == 3 * one.total
