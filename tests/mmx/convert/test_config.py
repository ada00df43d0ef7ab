"""config.json both ways: either spelling is read, and nothing is lost or guessed in silence."""

import dataclasses

import pytest

from configs.minimax_text_01 import get_config
from mmx.config import LIGHTNING, SOFTMAX, ConfigError
from mmx.convert.config import from_huggingface, to_huggingface
from tests.tiny import tiny

# Of the released MiniMax-Text-01, as published.
RELEASED = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": ([0] * 7 + [1]) * 10,
    "auto_map": {"AutoConfig": "configuration_minimax_text_01.MiniMaxText01Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_text_01",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}
TRANSFORMERS = to_huggingface(tiny(slope_rule="transformers"), "transformers", "float32")


def test_released_config():
    got = from_huggingface(RELEASED)
    recipe = get_config().model
    same = ("vocab_size", "hidden_size", "layer_pattern", "num_heads", "num_kv_heads", "head_dim", "rotary_dim")
    for name in (*same, "num_experts", "experts_per_token", "expert_hidden_size", "postnorm", "norm_eps", "slope_rule"):
        assert getattr(got.model, name) == getattr(recipe, name), name
    assert got.model.rope_base == 1e7
    for branch in ("lightning", "softmax", "experts"):
        assert got.model.alpha(branch) == pytest.approx(recipe.alpha(branch))
    back = to_huggingface(got.model, "released", "bfloat16", got.inert)
    changed = {name: (RELEASED.get(name), value) for name, value in back.items() if RELEASED.get(name) != value}
    assert changed.keys() == {"slope_rule", "torch_dtype"}
    fixed = {"attention_dropout", "router_jitter_noise", "sliding_window"}
    assert RELEASED.keys() - back.keys() == fixed  # Ones that the classes have by default.


@pytest.mark.parametrize("layout", ["released", "transformers"])
def test_round_trip_of_every_field(layout):
    model = tiny(
        lightning_alpha=1.5,
        softmax_beta=0.5,
        experts_alpha=2.5,
        norm_eps=1e-4,
        rope_base=5e5,
        aux_loss_form="released",
        aux_loss_coefficient=0.25,
        tie_embeddings=True,
        slope_rule=layout,
        num_heads=6,
        num_kv_heads=3,
    )
    got = from_huggingface(to_huggingface(model, layout, "float32")).model
    explicit = {f"{branch}_alpha": model.alpha(branch) for branch in ("lightning", "softmax", "experts")}
    assert got == dataclasses.replace(model, **explicit)


@pytest.mark.parametrize("fields", [RELEASED, TRANSFORMERS], ids=["released", "transformers"])
def test_rotated_channels(fields):
    bare = {name: value for name, value in fields.items() if name[:5] not in ("rotar", "rope_")}
    head_dim = bare["head_dim"]
    rotary_dim = lambda **more: from_huggingface(bare | more).model.rotary_dim  # noqa: E731
    assert rotary_dim() == head_dim
    assert rotary_dim(rotary_dim=head_dim // 2) == head_dim // 2
    assert rotary_dim(partial_rotary_factor=0.25) == head_dim // 4
    assert rotary_dim(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}) == head_dim // 2


def test_both_spellings_are_read_in_either_layout():
    mixed = TRANSFORMERS | {"attn_type_list": [0, 0, 1] * 2, "layernorm_mlp_beta": 1.0, "rope_theta": 10000}
    assert from_huggingface(mixed).model == from_huggingface(TRANSFORMERS).model
    del mixed["layer_types"]
    assert from_huggingface(mixed).model.layer_pattern == (LIGHTNING, LIGHTNING, SOFTMAX) * 2


def test_what_transformers_leaves_out():
    """Its older versions write no field that is as in its class."""
    model = from_huggingface({"model_type": "minimax", "num_hidden_layers": 4, "hidden_size": 64}).model
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.vocab_size) == (32, 8, 2, 32000)
    assert model.layer_pattern == (SOFTMAX, LIGHTNING) * 2
    assert (model.alpha("experts"), model.rope_base, model.rotary_dim) == (1.0, 1e6, 2)


MISTAKES = {
    "unknown field 'rotary_dims'.*did you mean 'rotary_dim'": {"rotary_dims": 4},
    "layer_types=.* and attn_type_list|attn_type_list=.* and layer_types=.* contradict": {"attn_type_list": [1] * 6},
    "linear_attn_alpha_factor=1.86.* contradict": {"layernorm_linear_attention_alpha": 2.0},
    "rotary_dim=4 and partial_rotary_factor=2 contradict": {"partial_rotary_factor": 0.25},
    "rope_theta=5.0 and rope_parameters.rope_theta=10000.0 contradict": {"rope_theta": 5.0},
    "partial_rotary_factor=0.3 of head_dim=8 is no whole number": {"partial_rotary_factor": 0.3},
    "hidden_act='gelu' is not supported, only 'silu' is": {"hidden_act": "gelu"},
    "shared_intermediate_size=64 is not supported": {"shared_intermediate_size": 64},
    "sliding_window=4096 is not supported": {"sliding_window": 4096},
    "router_jitter_noise=0.1 is not supported": {"router_jitter_noise": 0.1},
    "quantization_config=.* is not supported": {"quantization_config": {"quant_method": "fp8"}},
    "postnorm=false contradicts": {"postnorm": False},
    "unknown field 'rope_parameters.factor'": {"rope_parameters": {"factor": 2.0}},
    "rope_type='yarn' is not supported": {"rope_parameters": {"rope_type": "yarn"}},
    "speaks of 5 layers, num_hidden_layers of 6": {"layer_types": ["full_attention"] * 5},
    "layer_types must be a list of 'linear_attention' and 'full_attention'": {"layer_types": ["sliding"] * 6},
    "describes no model: vocab_size must be of type int, not 'many'": {"vocab_size": "many"},
    "describes no model: model.num_heads=4 is not a multiple": {"num_key_value_heads": 3},
    "has a field of the wrong type": {"head_dim": None, "hidden_size": "wide"},
    "partial_rotary_factor='half' is no number": {"partial_rotary_factor": "half"},
    "slope_rule='alibi' is not one of": {"slope_rule": "alibi"},
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_name_the_field(sentence):
    with pytest.raises(ConfigError, match=sentence):
        from_huggingface(TRANSFORMERS | MISTAKES[sentence])


def test_released_layout_says_everything():
    for name in ("attn_type_list", "hidden_size", "num_key_value_heads", "vocab_size"):
        with pytest.raises(ConfigError, match=f"lacks '{name}'"):
            from_huggingface({key: value for key, value in RELEASED.items() if key != name})


def test_layouts_that_cannot_say_it():
    with pytest.raises(ConfigError, match="no pre-norm"):
        to_huggingface(tiny(postnorm=False), "transformers", "float32")
    assert from_huggingface(to_huggingface(tiny(postnorm=False), "released", "float32")).model.postnorm is False
    for rule, layout in (("released", "transformers"), ("transformers", "released")):
        six = tiny(num_heads=6, num_kv_heads=3, slope_rule=rule)
        with pytest.raises(ConfigError, match=f"computes other decay slopes for 6 heads: write the {rule} layout"):
            to_huggingface(six, layout, "float32")
        four = tiny(slope_rule=rule)
        assert from_huggingface(to_huggingface(four, layout, "float32")).model.slope_rule == rule
