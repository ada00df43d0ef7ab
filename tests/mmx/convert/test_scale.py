"""456 billion parameters without their bytes, and the memory of a conversion while a model grows."""

import bisect
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.minimax_text_01 import get_config
from mmx.config import LIGHTNING, SOFTMAX, ModelConfig
from mmx.convert.config import to_huggingface
from mmx.convert.conversion import parse_size
from mmx.convert.export import Export
from mmx.convert.names import tensors
from mmx.convert.safetensors import INDEX
from mmx.convert.shards import Shard, Spec
from mmx.convert.source import open_directory, parameter_shapes, tensor_dtype
from mmx.convert.transfer import tensor_values
from tests.mmx.convert.peak import peak_bytes

RELEASED = get_config().model
SHARDS = 413  # As many as the published checkpoint has.
MIB = 1 << 20


def sparse_directory(folder: Path, config: ModelConfig, count: int) -> None:
    """A checkpoint of zeros that take no room: real headers, and files that are holes behind them."""
    specs = [Spec(t.name, tensor_dtype(t.name, config.param_dtype), t.shape) for t in tensors(config)]
    ends = list(itertools.accumulate(spec.nbytes for spec in specs))
    groups: list[list[Spec]] = [[] for _ in range(count)]
    for spec, end in zip(specs, ends, strict=True):
        groups[bisect.bisect_left([ends[-1] * (n + 1) / count for n in range(count)], end)].append(spec)
    folder.mkdir()
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        shard = Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group))
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header())
            file.truncate(len(shard.header()) + shard.nbytes)
        weight_map |= {spec.name: shard.file for spec in group}
    index = {"metadata": {"total_size": ends[-1]}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(to_huggingface(config, "released", config.param_dtype)))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse") / "released"
    config = get_config().model
    config.param_dtype, config.rope_base = "bfloat16", 1e7
    sparse_directory(folder, config, SHARDS)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 912_210_767_872
    return folder


def test_released_model_is_walked_without_its_bytes(released):
    source, translation = open_directory(released)
    config = source.config
    assert (translation.layout, config.param_dtype, len(source.reader.names())) == ("released", "bfloat16", 8243)
    assert config.layer_pattern == RELEASED.layer_pattern
    # Import: the boxes to read make up every parameter.
    shapes = parameter_shapes(config)
    assert source.parts.keys() == shapes.keys()
    for path, leaf in shapes.items():
        assert sum(math.prod(part.extent) for part in source.parts[path]) == leaf.size
    assert sum(leaf.size for leaf in shapes.values()) == 456_089_655_296
    # Export: the same names and shapes, in shards of the wanted size.
    export = Export(config, source.read, released / "out", "test", "released", shard_bytes=parse_size("2.25GB"))
    plan = export.plan()
    written = {spec.name: (spec.shape, spec.dtype) for shard in plan for spec in shard.specs}
    assert len(written) == sum(len(shard.specs) for shard in plan) == 8243
    reader = source.reader
    assert all(reader.info(name) == (dtype, shape) for name, (shape, dtype) in written.items())
    assert sum(shard.nbytes for shard in plan) == 912_210_767_872
    assert max(shard.nbytes for shard in plan if len(shard.specs) > 1) <= 2.25e9
    assert len(plan) == 422
    # And a tensor from either end, values and all.
    for name in ("model.layers.0.self_attn.qkv_proj.weight", "model.layers.79.block_sparse_moe.experts.31.w2.weight"):
        tensor = next(tensor for tensor in tensors(config) if tensor.name == name)
        values = tensor_values(tensor, source.read)
        assert values.shape == tensor.shape
        assert not np.any(values.view(np.uint16))


def test_released_model_in_the_program(released):
    """--dry_run reads 413 headers and holds no tensor."""
    assert peak_bytes(f"--source={released}", "--target=nowhere", "--dry_run") < 700 * MIB


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """Size of a checkpoint and most memory of an import and of exports, by the number of layers.

    54 MiB a layer, no tensor above 4 MiB.
    """
    folder = tmp_path_factory.mktemp("peaks")
    found = {}
    for layers in (4, 28):
        config = ModelConfig(
            vocab_size=512,
            hidden_size=1024,
            num_layers=layers,
            layer_pattern=(LIGHTNING, SOFTMAX) * (layers // 2),
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
            rotary_dim=32,
            num_experts=4,
            expert_hidden_size=2048,
            param_dtype="bfloat16",
        )
        at = folder / str(layers)
        at.mkdir()
        sparse_directory(at / "hf", config, 3)
        found[layers] = {
            "size": sum(path.stat().st_size for path in (at / "hf").glob("*.safetensors")),
            "import": peak_bytes(f"--source={at / 'hf'}", f"--target={at / 'run'}"),
        }
        for shard in ("4MiB", "64MiB"):
            found[layers][shard] = peak_bytes(
                f"--source={at / 'run'}", f"--target={at / shard}", f"--shard_size={shard}"
            )
            # No more disk than two checkpoints at a time.
            shutil.rmtree(at / shard)
        shutil.rmtree(at)
    return found


def test_memory_does_not_grow_with_the_number_of_layers(peaks):
    small, large = peaks[4], peaks[28]
    growth = large["size"] - small["size"]
    # What threads hold at a time varies from run to run by some 80 MB: an eighth of the growth has to be well above.
    assert growth > 1200 * MIB
    for work in ("import", "4MiB", "64MiB"):
        assert large[work] - small[work] < growth / 8, peaks


def test_memory_of_an_export_is_under_two_shards_and_a_tensor(peaks):
    # Over what the program needs when shards are as small as tensors.
    for found in peaks.values():
        assert found["64MiB"] - found["4MiB"] < (2 * 64 + 4) * MIB, peaks
