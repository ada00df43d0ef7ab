"""A trained model as a Python object: ``mmx.load(directory)``."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ConfigError, ModelConfig
from mmx.convert.config import is_huggingface
from mmx.convert.load import load_huggingface
from mmx.data.prepare import TOKENIZER
from mmx.data.tokenizer import Tokenizer
from mmx.generate import generate
from mmx.model.text import Params, bind
from mmx.train.checkpoint import find_checkpoints, load_params


@dataclasses.dataclass
class Model:
    """Configuration, parameters (nested dictionary of arrays) and, where there is one, the tokenizer."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None = None

    def logits(self, tokens_BS: Any, segment_ids_BS: Any = None) -> jax.Array:
        """Next-token logits, float32 [B, S, V].

        Args:
          tokens_BS: integer token ids.
          segment_ids_BS: integer document ids; a document begins wherever the id changes. None: one document a row.
        """
        tokens_BS = jnp.asarray(tokens_BS, jnp.int32)
        if tokens_BS.ndim != 2:
            raise ValueError(f"tokens must be [batch, sequence], not {tokens_BS.shape}")
        segments_BS = None if segment_ids_BS is None else jnp.asarray(segment_ids_BS, jnp.int32)
        return _logits(dataclasses.replace(self.config))(self.params, tokens_BS, segments_BS)

    def generate(
        self,
        prompt_ids: Any,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> np.ndarray | list[list[int]]:
        """Prompts with their continuations.

        Args:
          prompt_ids: one prompt [S], prompts of one length [B, S], or a list of prompts of different lengths.
          max_new_tokens, temperature, top_p, seed, stop_ids: see ``mmx.generate.generate``; temperature 0 is greedy.

        Returns:
          int32 [S + max_new_tokens] for one prompt, [B, S + max_new_tokens] for prompts of one length; lists of
          different lengths if prompts differ in length or a row stopped early.
        """
        is_single = len(prompt_ids) > 0 and np.ndim(prompt_ids[0]) == 0
        prompts = [[int(i) for i in prompt] for prompt in ([prompt_ids] if is_single else prompt_ids)]
        new = generate(
            self.config,
            self.params,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop_ids=stop_ids,
        )
        rows = [prompt + tokens for prompt, tokens in zip(prompts, new, strict=True)]
        if is_single:
            return np.asarray(rows[0], np.int32)
        return np.asarray(rows, np.int32) if len({len(row) for row in rows}) == 1 else rows


def load(directory: str | Path) -> Model:
    """Loads a model onto the mesh in scope, or onto the first device without one.

    Args:
      directory: a run's workdir (its newest checkpoint), one checkpoint, ``workdir/checkpoints/STEP``, or a Hugging
        Face directory of the MiniMax-01 text family, of the released layout or Transformers' own.

    Raises:
      ConfigError: if there is no checkpoint, or it is damaged.
    """
    directory = Path(directory)
    if directory.is_dir() and is_huggingface(directory):
        return Model(*load_huggingface(directory), _tokenizer(directory / TOKENIZER))
    folder, step = find_checkpoints(directory)
    config, params = load_params(folder, step)
    return Model(config, params, _tokenizer(folder.parent / TOKENIZER))


def _tokenizer(path: Path) -> Tokenizer | None:
    """A checkpoint's tokenizer; None if it has none, or one without the marks of documents that ours need."""
    try:
        return Tokenizer.load(path) if path.exists() else None
    except ConfigError as error:
        warnings.warn(f"loaded without a tokenizer: {error}", stacklevel=3)
        return None


@functools.cache
def _logits(config: ModelConfig):
    @jax.jit
    def logits(params, tokens_BS, segment_ids_BS):
        model = bind(config, params)
        return model.logits(model(tokens_BS, segment_ids_BS=segment_ids_BS)[0]).astype(jnp.float32)

    return logits
