"""Configuration: dataclasses, validation, and counts of parameters and FLOPs. Imports nothing else of ours."""

from mmx.config.count import ForwardFlops, ParameterCount, count_parameters, forward_flops, training_flops
from mmx.config.errors import ConfigError, nearest
from mmx.config.mesh import BATCH_AXES, MESH_AXES, MeshConfig
from mmx.config.model import HYBRID_PERIOD, LIGHTNING, SEQUENCE_LAYOUTS, SOFTMAX, ModelConfig
from mmx.config.optimizer import OptimizerConfig, Phase
from mmx.config.run import CheckpointConfig, DataConfig, MixturePoint, Run, TrainConfig
from mmx.config.serialize import check_field, from_dict, load_json, save_json, to_dict
from mmx.config.stage import Stage

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
    "Stage",
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
