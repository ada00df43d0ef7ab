"""A Hugging Face directory as a model's parameters: checked against its config, then read by boxes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ConfigError, ModelConfig
from mmx.convert.config import CONFIG, Translation, from_huggingface, read_config
from mmx.convert.names import (
    DERIVED_TENSORS,
    EMBEDDING,
    HEAD,
    Part,
    Path,
    is_router,
    parts_by_parameter,
    slope_tensors,
    spelling_of,
    tensors,
)
from mmx.convert.safetensors import Directory, TensorReader
from mmx.convert.transfer import Box, intersect, parameter_box
from mmx.model.text import init_params
from pallas_kernels.lightning_attention import layer_slopes

_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint's tensors as the parameters of a model."""

    config: ModelConfig
    reader: TensorReader
    spelling: str  # of its experts, see ``mmx.convert.names``

    @functools.cached_property
    def parts(self) -> dict[Path, list[Part]]:
        """Where each parameter is found."""
        return parts_by_parameter(self.config, self.spelling)

    def read_part(self, part: Part, box: Box) -> np.ndarray:
        """A box within a part of a parameter, in the dtype that the model keeps it in."""
        return parameter_box(self.reader, part, box).astype(parameter_shapes(self.config)[part.path].dtype, copy=False)

    def read(self, path: Path, box: Box) -> np.ndarray:
        """Any box of a parameter, in the dtype that the model keeps it in."""
        part = self._starting.get((path, tuple(one.start for one in box)))
        if part is not None and intersect(part, box) == box:
            return self.read_part(part, box)
        result = np.empty([one.stop - one.start for one in box], parameter_shapes(self.config)[path].dtype)
        for part in self.parts[path]:
            if common := intersect(part, box):
                within = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True))
                result[within] = parameter_box(self.reader, part, common)
        return result

    @functools.cached_property
    def _starting(self) -> dict[tuple[Path, tuple[int, ...]], Part]:
        return {(part.path, part.start): part for parts in self.parts.values() for part in parts}


def open_directory(folder: FilePath, dtype: str | None = None) -> tuple[Source, Translation]:
    """Opens a Hugging Face directory and checks it whole, reading headers alone.

    Args:
      dtype: of the parameters, "float32" or "bfloat16"; None takes the tensors' own.

    Raises:
      ConfigError: for anything that is missing, unknown, contradictory or of the wrong shape, by its name.
    """
    translation = from_huggingface(read_config(folder), str(folder / CONFIG))
    reader = Directory(folder)
    return open_tensors(translation.model, reader, dtype, where=str(folder)), translation


def open_tensors(config: ModelConfig, reader: TensorReader, dtype: str | None = None, where: str = "it") -> Source:
    """Checks that a reader holds the tensors of a model and nothing else.

    Args:
      config: its ``param_dtype`` is replaced by ``dtype``, or by the dtype of the tensors.
      where: what messages call the reader.

    Raises:
      ConfigError: see ``open_directory``.
    """
    config = dataclasses.replace(config)
    names = set(reader.names())
    spelling = spelling_of(names)
    wanted = {tensor.name: tensor.shape for tensor in tensors(config, spelling)}
    _require_shapes(reader, wanted, names, where)
    derived = {name for name in names if DERIVED_TENSORS.search(name)}
    extra = names - wanted.keys() - derived
    if config.tie_embeddings and HEAD in extra:
        _require_tied(reader, where)
        extra.remove(HEAD)
    if extra:
        raise ConfigError(f"{where} has tensors that its config does not speak of: {_list(extra)}")
    _require_slopes(config, reader, derived, where)
    config.param_dtype = dtype or _dtype(reader, wanted, where)
    return Source(config, reader, spelling)


@functools.cache
def _shapes(config: ModelConfig) -> dict[Path, jax.ShapeDtypeStruct]:
    return flatten(jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0)))


def parameter_shapes(config: ModelConfig) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, by its path in the tree."""
    return _shapes(dataclasses.replace(config))


def flatten(tree: dict[str, Any]) -> dict[Path, Any]:
    """Leaves of nested dictionaries by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def unflatten(leaves: dict[Path, Any]) -> dict[str, Any]:
    """Nested dictionaries of what ``flatten`` took apart."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def tensor_dtype(name: str, param_dtype: str) -> np.dtype:
    """The dtype in which a tensor is written: the router's matrices are fp32 whatever the others are."""
    return np.dtype(np.float32) if is_router(name) else jnp.dtype(param_dtype)


def _require_shapes(reader: TensorReader, wanted: dict[str, tuple[int, ...]], names: set[str], where: str) -> None:
    missing = wanted.keys() - names
    if missing:
        raise ConfigError(f"{where} lacks {_list(missing)}: is a shard or an entry of its index missing?")
    for name, shape in wanted.items():
        if reader.info(name).shape != shape:
            raise ConfigError(
                f"{where}: {name} has shape {list(reader.info(name).shape)} and its config asks for {list(shape)}"
            )


def _require_tied(reader: TensorReader, where: str) -> None:
    """A tied head may be written out; it must be the embedding then."""
    rows, width = reader.info(EMBEDDING).shape
    if reader.info(HEAD).shape == (rows, width):
        step = max((64 << 20) // (4 * width), 1)
        blocks = (slice(start, min(start + step, rows)) for start in range(0, rows, step))
        read = lambda tensor, block: reader.read(tensor, (rows, width), (block, slice(0, width)))  # noqa: E731
        if all(np.array_equal(read(HEAD, block), read(EMBEDDING, block)) for block in blocks):
            return
    raise ConfigError(f"{where}: tie_word_embeddings=true contradicts an {HEAD} other than {EMBEDDING}")


def _require_slopes(config: ModelConfig, reader: TensorReader, derived: set[str], where: str) -> None:
    """Slopes that a checkpoint holds, as Transformers writes them, must be those that we compute."""
    H = config.num_heads
    for name, number in slope_tensors(config).items():
        if name not in derived:
            continue
        held = reader.read(name, (H,), (slice(0, H),)).astype(np.float32)
        ours = layer_slopes(H, number, config.num_layers, config.slope_rule)
        # They may have been rounded to bf16; the rules differ by factors, or by 1e-5.
        if not np.allclose(held, ours, rtol=1e-2, atol=2e-5):
            raise ConfigError(
                f"{where}: {name} contradicts the slopes of the {config.slope_rule!r} rule; name the rule that the "
                f"checkpoint uses in {CONFIG} as slope_rule, 'released' or 'transformers'"
            )


def _dtype(reader: TensorReader, wanted: dict[str, tuple[int, ...]], where: str) -> str:
    """bf16 if every tensor but the router's is; fp32, which holds fp16 and bf16 exactly, otherwise."""
    dtypes = {}
    for name in wanted:
        dtypes.setdefault(reader.info(name).dtype, name)
        if not is_router(name) and reader.info(name).dtype != jnp.bfloat16:
            dtypes.setdefault("not bf16", name)
    if np.dtype(np.float64) in dtypes:
        raise ConfigError(
            f"{where}: {dtypes[np.dtype(np.float64)]} is float64, which would be rounded: save it as fp32"
        )
    return "float32" if "not bf16" in dtypes else "bfloat16"


def _list(names: set[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown) + more
