"""Configuration: dataclasses, validation, and counts of parameters and FLOPs. Imports nothing else of ours."""

from mmx.config.count import ForwardFlops, ParameterCount, count_parameters, forward_flops, training_flops
from mmx.config.errors import ConfigError, nearest
from mmx.config.model import HYBRID_PERIOD, LIGHTNING, SEQUENCE_LAYOUTS, SOFTMAX, ModelConfig
from mmx.config.run import (
    BATCH_AXES,
    MESH_AXES,
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    MixturePoint,
    OptimizerConfig,
    Phase,
    Run,
    TrainConfig,
)
from mmx.config.serialize import check_field, from_dict, load_json, save_json, to_dict

__all__ = [
    "BATCH_AXES",
    "HYBRID_PERIOD",
    "LIGHTNING",
    "MESH_AXES",
    "SEQUENCE_LAYOUTS",
    "SOFTMAX",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "ForwardFlops",
    "MeshConfig",
    "MixturePoint",
    "ModelConfig",
    "OptimizerConfig",
    "ParameterCount",
    "Phase",
    "Run",
    "TrainConfig",
    "check_field",
    "count_parameters",
    "forward_flops",
    "from_dict",
    "load_json",
    "nearest",
    "save_json",
    "to_dict",
    "training_flops",
]
