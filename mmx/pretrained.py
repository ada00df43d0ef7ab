"""A trained model as a Python object: ``mmx.load(directory)``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ConfigError, ModelConfig
from mmx.data.prepare import TOKENIZER
from mmx.data.tokenizer import Tokenizer
from mmx.generate import generate
from mmx.model.text import Params, bind
from mmx.train.checkpoint import load_params
from mmx.train.loop import CHECKPOINTS


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
    """Loads a model from a run's workdir (its newest checkpoint) or from one checkpoint, ``workdir/checkpoints/STEP``.

    Raises:
      ConfigError: if there is no checkpoint.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory")
    if (directory / CHECKPOINTS).is_dir():
        workdir, step = directory, None
    elif directory.parent.name == CHECKPOINTS and directory.name.isdigit():
        workdir, step = directory.parent.parent, int(directory.name)
    elif any(directory.glob("*.safetensors")):
        raise ConfigError(
            f"{directory} holds a Hugging Face checkpoint, which mmx does not read yet (README, 'Not yet')"
        )
    else:
        raise ConfigError(f"{directory} holds no checkpoints: give the workdir of a run or one of its checkpoints")
    config, params = load_params(workdir / CHECKPOINTS, step)
    tokenizer = Tokenizer.load(workdir / TOKENIZER) if (workdir / TOKENIZER).exists() else None
    return Model(config, params, tokenizer)


@functools.cache
def _logits(config: ModelConfig):
    @jax.jit
    def logits(params, tokens_BS, segment_ids_BS):
        model = bind(config, params)
        return model.logits(model(tokens_BS, segment_ids_BS=segment_ids_BS)[0]).astype(jnp.float32)

    return logits
