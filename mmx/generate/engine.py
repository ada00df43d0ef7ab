"""Generation with a cache: a state of constant size for each lightning layer, keys and values for each softmax layer.

Prompts of different lengths are padded on the left, with a segment id of their own. Lightning states start anew where
the prompt begins and softmax layers do not see the padding, so every row is computed as if it were alone.

Shapes: B batch, P padded prompt, T cache slots (prompt and new tokens), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ModelConfig
from mmx.generate.sampling import sample
from mmx.model.softmax import KeyValues
from mmx.model.text import Params, bind
from mmx.parallel import constrain

_PADDING, _PROMPT = 0, 1
# Prompts and caches are rounded up to multiples of these, so that few lengths are compiled.
_PROMPT_MULTIPLE, _CACHE_MULTIPLE = 32, 128


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt.

    Args:
      prompts: token ids, at least one each.
      max_new_tokens: most tokens to add to each.
      temperature, top_p: see ``mmx.generate.sampling``.
      seed: of the sampling; the same seed gives the same text.
      stop_ids: a row ends with the first of these that it produces.
      on_tokens: called with the new token of every row, int32 [B], as soon as it is known.

    Returns:
      The new tokens of each row, a stop token included.

    Raises:
      ValueError: for an empty prompt or a token outside of the vocabulary.
    """
    _check(config, prompts, max_new_tokens)
    lengths_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
    P = _round_up(int(lengths_B.max()), _PROMPT_MULTIPLE)
    T = _round_up(P + max_new_tokens, _CACHE_MULTIPLE)
    padding_B = P - lengths_B
    tokens_BP = np.stack([np.pad(prompt, (pad, 0)) for prompt, pad in zip(prompts, padding_B, strict=True)])

    prefill, step = prefill_and_step(dataclasses.replace(config))
    logits_BV, cache = prefill(params, jnp.asarray(tokens_BP, jnp.int32), jnp.asarray(padding_B), T)
    choose = jax.jit(sample)
    key = jax.random.key(seed)
    rows: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(rows)
    for n in range(max_new_tokens):
        chosen = choose(logits_BV, jax.random.fold_in(key, n), jnp.float32(temperature), jnp.float32(top_p))
        chosen_B = np.asarray(chosen)
        for row, token in enumerate(chosen_B.tolist()):
            if running[row]:
                rows[row].append(token)
                running[row] = token not in stop_ids
        if on_tokens is not None:
            on_tokens(chosen_B)
        if n + 1 == max_new_tokens or not any(running):
            break
        logits_BV, cache = step(params, chosen, cache, jnp.int32(P + n), jnp.asarray(padding_B))
    return rows


@functools.cache
def prefill_and_step(config: ModelConfig) -> tuple[Any, Any]:
    """The jitted functions that ``generate`` alternates between; their own docstrings say what they take."""

    @functools.partial(jax.jit, static_argnums=3)
    def prefill(params, tokens_BP, padding_B, slots):
        """Logits after the prompt [B, V], and the cache with room for ``slots`` tokens."""
        P = tokens_BP.shape[1]
        model = bind(config, params)
        segment_ids_BP = jnp.where(jnp.arange(P) < padding_B[:, None], _PADDING, _PROMPT)
        x_BPD, _, cache = model(tokens_BP, segment_ids_BS=segment_ids_BP, keep_cache=True)
        # On a mesh the last token of a row lies with the last of the devices that share it.
        last_BD = constrain(x_BPD, "batch", None, None)[:, -1]
        return model.logits(last_BD), jax.tree.map(_grow(slots - P), cache, is_leaf=_is_key_values)

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, token_B, cache, slot, padding_B):
        """Logits after one more token [B, V], and the cache with it."""
        model = bind(config, params)
        index_T = jnp.arange(_slots(cache))
        valid_BT = (index_T >= padding_B[:, None]) & (index_T <= slot)
        x_BD, cache = model.step(token_B, cache, slot, slot - padding_B, valid_BT)
        return model.logits(x_BD), cache

    return prefill, step


def _grow(slots: int) -> Callable[[Any], Any]:
    """Adds empty slots to keys and values [P, R, B, T, G, K]; leaves states as they are."""

    def grow(cache):
        if not _is_key_values(cache):
            return cache
        return KeyValues(*(jnp.pad(x, ((0, 0),) * 3 + ((0, slots), (0, 0), (0, 0))) for x in cache))

    return grow


def _is_key_values(node: Any) -> bool:
    return isinstance(node, KeyValues)


def _slots(cache: dict[str, Any]) -> int:
    """T; without softmax layers there is nothing to mask and any number will do."""
    return next((node.k_BTGK.shape[3] for node in cache.values() if _is_key_values(node)), 1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    largest = max(max(prompt) for prompt in prompts)
    if largest >= config.vocab_size or min(min(prompt) for prompt in prompts) < 0:
        raise ValueError(f"prompt token {largest} is outside of the vocabulary of {config.vocab_size}")
