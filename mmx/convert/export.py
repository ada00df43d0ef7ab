"""Parameters to a Hugging Face directory, one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from mmx.config import ConfigError, ModelConfig
from mmx.convert.checkpoint import require_room
from mmx.convert.config import CONFIG, to_huggingface
from mmx.convert.names import Tensor, tensors
from mmx.convert.shards import Shard, ShardWriter, Spec, plan_shards
from mmx.convert.source import tensor_dtype
from mmx.convert.transfer import ReadParameter, tensor_values
from mmx.data.prepare import TOKENIZER
from mmx.data.tokenizer import Tokenizer

GENERATION = "generation_config.json"
# What goes from one directory to the other as it is: tokenizer, sampling defaults, and the code of the released layout,
# which is copied and never run.
SIDECARS = (
    TOKENIZER,
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
    "configuration_minimax*.py",
    "modeling_minimax*.py",
)
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Export:
    """What is to be written where.

    Attributes:
      config: of the model.
      read: reads a box of a parameter.
      target: directory to write; a directory with an unfinished export of the same origin is gone on with.
      origin: says where the parameters come from.
      layout: "released" or "transformers".
      dtype: of the tensors; None keeps that of the parameters. Router matrices are fp32 in any case.
      shard_bytes: largest size of a shard's tensors.
      inert: fields of an earlier config.json to carry along.
      sidecars: directory whose tokenizer and generation files are copied, if there is one.
    """

    config: ModelConfig
    read: ReadParameter
    target: FilePath
    origin: str
    layout: str
    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    inert: dict[str, Any] = dataclasses.field(default_factory=dict)
    sidecars: FilePath | None = None

    def plan(self) -> list[Shard]:
        """The shards that will be written. Raises ConfigError if the shard size is none."""
        if self.shard_bytes < 1:
            raise ConfigError(f"a shard of {self.shard_bytes} bytes holds nothing: give a size such as 5GB")
        dtype = self.dtype or self.config.param_dtype
        specs = [Spec(t.name, tensor_dtype(t.name, dtype), t.shape) for t in tensors(self.config)]
        return plan_shards(specs, self.shard_bytes)

    def fields(self) -> dict[str, Any]:
        """Its config.json. Raises ConfigError if the layout cannot say what the model is."""
        dtype = self.dtype or self.config.param_dtype
        return to_huggingface(self.config, self.layout, dtype, self.inert | self._token_ids())

    def run(self, progress: Callable[[int], None]) -> list[Shard]:
        """Writes everything; returns the shards.

        Raises:
          ConfigError: if the layout cannot say what the model is, the target holds something else, or there is no room.
        """
        fields, plan = self.fields(), self.plan()
        by_name: dict[str, Tensor] = {tensor.name: tensor for tensor in tensors(self.config)}
        writer = ShardWriter(self.target, plan, json.dumps([self.origin, fields], sort_keys=True))
        require_room(self.target, writer.nbytes_left)
        writer.begin()
        self._write_small_files(fields)

        def values(spec: Spec) -> np.ndarray:
            return tensor_values(by_name[spec.name], self.read, spec.dtype)

        # Making a tensor takes up to three times its size: as read, permuted, and in another dtype. With what the
        # reader keeps for the next one, this stays under a shard.
        writer.write(values, max(shard.nbytes for shard in plan) // 6, progress)
        writer.finish()
        return plan

    def _token_ids(self) -> dict[str, Any]:
        """Begin and end of a document, for a model that was trained here; a converted one brings its own."""
        tokenizer = None if self.inert or self.sidecars is None else _own_tokenizer(self.sidecars)
        if tokenizer is None:
            return {}
        return {"bos_token_id": tokenizer.begin_of_document, "eos_token_id": tokenizer.end_of_document}

    def _write_small_files(self, fields: dict[str, Any]) -> None:
        (self.target / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        if self.sidecars is not None:
            copy_sidecars(self.sidecars, self.target)
        if not (self.target / GENERATION).exists():
            ids = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            (self.target / GENERATION).write_text(json.dumps(ids, indent=2) + "\n")
        tokenizer = _own_tokenizer(self.target)
        if tokenizer is not None and not (self.target / "tokenizer_config.json").exists():
            names = {"bos_token": tokenizer.begin_of_document, "eos_token": tokenizer.end_of_document}
            entries: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
            entries |= {name: tokenizer.token_name(index) for name, index in names.items()}
            (self.target / "tokenizer_config.json").write_text(json.dumps(entries, indent=2) + "\n")


def _own_tokenizer(folder: FilePath) -> Tokenizer | None:
    """A tokenizer that launch.prepare trained; others are copied and not looked into."""
    try:
        return Tokenizer.load(folder / TOKENIZER)
    except ConfigError:  # None there, or one of somebody else's kind.
        return None


def copy_sidecars(source: FilePath, target: FilePath) -> None:
    """Copies tokenizer, generation and code files that are there."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in SIDECARS:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
