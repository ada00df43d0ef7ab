"""The smallest model that has everything, and inputs for it."""

import dataclasses
import functools

import jax
import numpy as np

from mmx.config import ModelConfig
from mmx.model.text import init_params

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    num_layers=6,
    layer_pattern=("lightning", "lightning", "softmax") * 2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rotary_dim=4,
    num_experts=4,
    expert_hidden_size=20,
)


def tiny(**changes) -> ModelConfig:
    """The tiny model with other fields."""
    return dataclasses.replace(TINY, **changes)


@functools.cache
def params(config: ModelConfig = TINY, seed: int = 0):
    """Parameters of a configuration, larger than at initialisation so that every part matters to the output."""
    fresh = jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    return jax.tree.map(lambda x: x if x.ndim == 3 else 2.5 * x, fresh)


def tokens(batch: int, length: int, seed: int = 0, vocab_size: int = TINY.vocab_size) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length), dtype=np.int32)
