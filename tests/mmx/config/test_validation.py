"""Every mistake is one sentence that names the field and what to change."""

import dataclasses

import pytest

from configs import minimax_text_01, quickstart, text_1b
from mmx.config import ConfigError, MeshConfig, MixturePoint, ModelConfig, OptimizerConfig, Phase, Run, check_field

MODEL_MISTAKES = {
    "num_heads=6 is not a multiple of model.num_kv_heads=4": {"num_heads": 6, "num_kv_heads": 4},
    "experts_per_token=9 exceeds model.num_experts=4": {"experts_per_token": 9},
    "layer_pattern has 8 entries and model.num_layers is 9": {"num_layers": 9},
    "contains 'linear': use 'lightning' or 'softmax'": {"layer_pattern": ("linear",) * 8},
    "rotary_dim=65 must be even": {"rotary_dim": 65},
    "rotary_dim=128 must be even and between 0 and model.head_dim=64": {"rotary_dim": 128},
    "hidden_size is 0: set it to at least 1": {"hidden_size": 0},
    "dtype='float16' is not one of 'float32', 'bfloat16'": {"dtype": "float16"},
    "remat='some' is not one of": {"remat": "some"},
    "capacity_factor=-1.0 is negative": {"capacity_factor": -1.0},
    "slope_rule='alibi' is not one of 'released', 'transformers'": {"slope_rule": "alibi"},
    "aux_loss_form='z' is not one of": {"aux_loss_form": "z"},
    "softmax_alpha=0.0 must be greater than 0": {"softmax_alpha": 0.0},
    "sequence_layout='striped' is not one of": {"sequence_layout": "striped"},
    "capacity_factor=0 sets none": {"global_router": True},
    "rope_base=1.0 must be greater than 1": {"rope_base": 1.0},
}


@pytest.mark.parametrize("sentence", MODEL_MISTAKES)
def test_model(sentence):
    with pytest.raises(ConfigError, match=sentence.replace("(", r"\(")):
        dataclasses.replace(ModelConfig(), **MODEL_MISTAKES[sentence]).validate()


RUN_MISTAKES = {
    "cannot be split over context = 4 and slices of model.sequence_layout = 2: use a multiple of 8": (
        {"data.sequence_length": 510, "mesh.context": 4},
        4,
    ),
    "num_kv_heads=2 cannot be split over tensor = 4": ({"mesh.tensor": 4}, 4),
    "num_experts=4 cannot be split over expert = 3": ({"mesh.expert": 3}, 3),
    "batch_size=6 cannot be split over replica x fsdp = 4": (
        {"data.batch_size": 6, "mesh.fsdp": 2, "mesh.replica": 2},
        4,
    ),
    "batch_size=8 cannot be split over train.micro_batches = 3: use a multiple of 3": ({"train.micro_batches": 3}, 1),
    "the mesh has fsdp 2 = 2 devices and this run has 8": ({"mesh.fsdp": 2}, 8),
    "mesh.replica and mesh.fsdp are both -1": ({"mesh.fsdp": -1, "mesh.replica": -1}, 8),
    "mesh.fsdp=-1 cannot take the rest: the other axes make 3": ({"mesh.fsdp": -1, "mesh.replica": 3}, 8),
    "mesh.fsdp=0: use a positive size": ({"mesh.fsdp": 0}, 8),
    "vocab_size=4095 cannot be split over tensor = 2": ({"mesh.tensor": 2, "model.vocab_size": 4095}, 2),
    "exchange_groups=7 does not divide the 4096 tokens": ({"model.exchange_groups": 7}, 1),
    "train.steps=0 is too small": ({"train.steps": 0}, 1),
    "checkpoint.keep=0 is too small": ({"checkpoint.keep": 0}, 1),
    "optimizer.peak_lr=0.0 must be greater than 0": ({"optimizer.peak_lr": 0.0}, 1),
    "optimizer.b2=1.0 must be in": ({"optimizer.b2": 1.0}, 1),
    "optimizer.schedule is empty": ({"optimizer.schedule": ()}, 1),
    "kind='step' is not one of": ({"optimizer.schedule": (Phase("step", 1.0),)}, 1),
    "has no length": ({"optimizer.schedule": (Phase("linear", 1.0), Phase("constant", 1.0))}, 1),
    "needs either steps or tokens": ({"optimizer.schedule": (Phase("linear", 1.0, steps=1, tokens=1),)}, 1),
    "data.short_below=200 is above data.long_above=100": ({"data.short_below": 200, "data.long_above": 100}, 1),
    "data.mixture and data.mixture_points are both set": (
        {"data.mixture": ("a=1",), "data.mixture_points": (MixturePoint(0, ("a=1",)),)},
        1,
    ),
    "data.mixture_points[1].row=5 must be at least 6": (
        {"data.mixture_points": (MixturePoint(5, ("a=1",)), MixturePoint(5, ("b=1",)))},
        1,
    ),
    "must start and end above 0": ({"optimizer.schedule": (Phase("exponential", 0.1, steps=5),)}, 1),
}


@pytest.mark.parametrize("sentence", RUN_MISTAKES)
def test_run(sentence):
    changes, devices = RUN_MISTAKES[sentence]
    run = Run()
    for path, value in changes.items():
        branch, field = path.split(".")
        setattr(getattr(run, branch), field, value)
    with pytest.raises(ConfigError) as caught:
        run.validate(devices)
    assert sentence in str(caught.value)


def test_mesh_takes_the_rest():
    assert MeshConfig(replica=2, fsdp=-1).sizes(8)["fsdp"] == 4


@pytest.mark.parametrize(("recipe", "devices"), [(quickstart, 1), (text_1b, 1), (text_1b, 8), (minimax_text_01, 512)])
def test_recipes_are_valid(recipe, devices):
    recipe.get_config().validate(devices)


def test_unknown_field_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"'model.num_head'.*did you mean 'num_heads'"):
        check_field(Run(), "model.num_head")
    with pytest.raises(ConfigError, match="did you mean 'optimizer'"):
        check_field(Run(), "optimzer.peak_lr")
    check_field(Run(), "optimizer.peak_lr")


def test_deepnorm_alpha_is_the_default():
    assert ModelConfig(num_layers=80).alpha("lightning") == pytest.approx(3.5565588200778455)
    assert ModelConfig(postnorm=False).alpha("experts") == 1.0
    assert ModelConfig(softmax_alpha=2.0).alpha("softmax") == 2.0
    assert OptimizerConfig().b2 == 0.95
