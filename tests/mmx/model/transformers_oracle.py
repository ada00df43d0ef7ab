"""Transformers' MiniMax class as an oracle for the text model, with what it gets wrong put right in this process."""

import contextlib
import dataclasses

import numpy as np
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

from mmx.config import ModelConfig
from mmx.convert.config import TRANSFORMERS, to_huggingface
from mmx.convert.load import load_parameters
from mmx.convert.safetensors import Arrays
from mmx.convert.source import open_tensors
from mmx.convert.twin import corrected


@contextlib.contextmanager
def oracle(config: ModelConfig, seed: int = 0, *, correct: bool = True):
    """A random Transformers model of the configuration, fp32.

    Args:
      correct: with partial RoPE and the configuration's own slopes (``mmx.convert.twin``); False: the class as it is.
    """
    torch.manual_seed(seed)
    fields = to_huggingface(dataclasses.replace(config, slope_rule=TRANSFORMERS), TRANSFORMERS, "float32")
    model = MiniMaxForCausalLM(MiniMaxConfig(**fields | {"initializer_range": 0.1, "block_size": 16})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # Ones would hide a norm that is left out.
                parameter.add_(0.2 * torch.randn_like(parameter))
    with corrected(model, config) if correct else contextlib.nullcontext():
        yield model


def to_mmx(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict:
    """Parameters, or gradients, by Transformers' names in our tree."""
    return load_parameters(open_tensors(config, Arrays(tensors)))
