"""Hugging Face directories of made-up weights, written without any of our own code's names for parameters."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from mmx.config import ModelConfig
from mmx.convert.config import to_huggingface
from mmx.convert.names import is_router, tensors
from mmx.convert.safetensors import Directory
from mmx.convert.shards import ShardWriter, Spec, plan_shards
from tests.tiny import tiny

# A model whose gates are the only fp32, and whose heads and groups are all different numbers.
BF16 = tiny(dtype="bfloat16", param_dtype="bfloat16", num_heads=6, num_kv_heads=3, num_experts=5)


def write_tensors(folder: Path, values: dict[str, np.ndarray], shard_bytes: int = 1 << 30) -> None:
    """Writes shards and an index."""
    specs = [Spec(name, array.dtype, array.shape) for name, array in values.items()]
    writer = ShardWriter(folder, plan_shards(specs, shard_bytes), "test")
    writer.begin()
    writer.write(lambda spec: values[spec.name], 1 << 20, lambda _: None)
    writer.finish()


def write_directory(folder: Path, config: ModelConfig = BF16, layout: str = "released", shard_bytes: int = 20_000):
    """A whole directory: random tensors in bf16, gates in fp32, config.json and a tokenizer's files."""
    rng = np.random.default_rng(0)
    values = {}
    for tensor in tensors(config):
        dtype = np.float32 if is_router(tensor.name) else ml_dtypes.bfloat16
        values[tensor.name] = (0.2 * rng.standard_normal(tensor.shape)).astype(dtype)
    write_tensors(folder, values, shard_bytes)
    fields = to_huggingface(config, layout, "bfloat16") | {"eos_token_id": 7, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "generation_config.json").write_text('{"eos_token_id": 200020, "top_p": 0.95}')
    (folder / "vocab.json").write_text('{"a": 0}')
    return values


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a directory."""
    directory = Directory(folder)
    whole = lambda shape: tuple(slice(0, n) for n in shape)  # noqa: E731
    shapes = {name: directory.info(name).shape for name in directory.names()}
    return {name: directory.read(name, shape, whole(shape)) for name, shape in shapes.items()}


def edit_config(folder: Path, **changes) -> None:
    """Changes fields of config.json; None removes one."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def same_bytes(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> bool:
    """Whether two checkpoints have the same tensors, bit for bit, of the same dtypes."""
    return got.keys() == want.keys() and all(
        got[name].dtype == array.dtype and got[name].tobytes() == array.tobytes() for name, array in want.items()
    )
