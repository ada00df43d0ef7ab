"""The table of names covers every parameter once, in either spelling, and is the released checkpoint's list."""

import math

import numpy as np
import pytest

from configs.minimax_text_01 import get_config
from mmx.convert.names import FUSED, SEPARATE, parts_by_parameter, tensors
from mmx.convert.source import parameter_shapes, tensor_dtype
from tests.tiny import TINY, tiny

RELEASED = get_config().model
CONFIGS = {
    "hybrid": TINY,
    "tied": tiny(tie_embeddings=True),
    "irregular": tiny(num_layers=5, layer_pattern=("softmax", "lightning", "lightning", "softmax", "lightning")),
    "all softmax": tiny(num_layers=2, layer_pattern=("softmax",) * 2),
}


@pytest.mark.parametrize("spelling", [SEPARATE, FUSED])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_of_every_parameter_is_in_one_place(name, spelling):
    config = CONFIGS[name]
    shapes, parts = parameter_shapes(config), parts_by_parameter(config, spelling)
    assert parts.keys() == shapes.keys()
    for path, leaf in shapes.items():
        times = np.zeros(leaf.shape, int)
        for part in parts[path]:
            times[tuple(slice(s, s + n) for s, n in zip(part.start, part.extent, strict=True))] += 1
        assert np.all(times == 1), path


@pytest.mark.parametrize("spelling", [SEPARATE, FUSED])
def test_every_value_of_every_tensor_is_used_once(spelling):
    for tensor in tensors(tiny(num_heads=6, num_kv_heads=3), spelling):
        times = np.zeros(tensor.parts[0].view, int)
        for part in tensor.parts:
            times[tuple(slice(None) if fixed is None else fixed for fixed in part.fixed)] += 1
        assert np.all(times == 1), tensor.name
        assert times.size == math.prod(tensor.shape), tensor.name


def test_released_model():
    """Counts of the released index: 8,243 tensors, 912,210,767,872 bytes with the routers' matrices in fp32."""
    everything = list(tensors(RELEASED))
    shapes = {tensor.name: tensor.shape for tensor in everything}
    assert len(everything) == len(shapes) == 8243
    total = sum(tensor.size * tensor_dtype(tensor.name, "bfloat16").itemsize for tensor in everything)
    assert total == 912_210_767_872
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (200_064, 6144)
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (3 * 8192, 6144)
    assert shapes["model.layers.6.self_attn.out_proj.weight"] == (6144, 8192)
    assert shapes["model.layers.78.self_attn.norm.weight"] == (8192,)
    assert shapes["model.layers.7.self_attn.k_proj.weight"] == (1024, 6144)
    assert shapes["model.layers.79.self_attn.o_proj.weight"] == (6144, 8192)
    assert shapes["model.layers.79.block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)
    assert shapes["model.layers.40.block_sparse_moe.gate.weight"] == (32, 6144)
