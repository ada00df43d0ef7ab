"""A small model of the same kind, here and in PyTorch: the same logits, or something in the conversion is wrong.

Transformers' class rotates every channel of a head whatever its config says, and has decay slopes of its own. Both are
set right here on the objects, in this process, as long as the comparison lasts; no installed file is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmx.config import LIGHTNING, ConfigError, ModelConfig
from mmx.convert.config import TRANSFORMERS
from mmx.convert.export import Export
from mmx.convert.names import DERIVED_TENSORS
from mmx.convert.source import flatten
from mmx.model.text import bind, init_params, layer_runs
from pallas_kernels.lightning_attention import layer_slopes

# Largest difference of a logit, both in fp32.
TOLERANCE = 1e-4
_TOKENS = (2, 75)


def can_compare(config: ModelConfig) -> str:
    """Why the comparison cannot be made; empty if it can."""
    if not config.postnorm:
        return "Transformers has no pre-norm model"
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


def small_twin(config: ModelConfig) -> ModelConfig:
    """A model of the same pattern, grouping, shares and scales, of two periods at most and a few hundred kB."""
    periods, _ = layer_runs(config.layer_pattern)
    layers = config.num_layers // periods * min(periods, 2)
    group = config.num_heads // config.num_kv_heads
    experts = min(config.num_experts, 4)
    scales = {f"{branch}_alpha": config.alpha(branch) for branch in ("lightning", "softmax", "experts")}
    return dataclasses.replace(
        config,
        vocab_size=min(config.vocab_size, 97),
        hidden_size=32,
        num_layers=layers,
        layer_pattern=tuple(config.layer_pattern[:layers]),
        num_heads=group * min(config.num_kv_heads, 2),
        num_kv_heads=min(config.num_kv_heads, 2),
        head_dim=16,
        rotary_dim=2 * round(8 * config.rotary_dim / config.head_dim),
        num_experts=experts,
        experts_per_token=min(config.experts_per_token, experts),
        expert_hidden_size=24,
        dtype="float32",
        param_dtype="float32",
        **scales,
    )


def twin_difference(config: ModelConfig, seed: int = 0) -> float:
    """Largest difference of a logit between the small twin here and in PyTorch, through files that we write.

    Raises:
      ConfigError: if Transformers finds tensors missing or unexpected in the files.
    """
    import torch

    config = small_twin(config)
    params = jax.jit(functools.partial(init_params, config))(jax.random.key(seed))
    # Larger than at initialisation, so that every part matters to the logits.
    params = jax.tree.map(lambda x: x if x.ndim == 3 else 2 * x, params)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, _TOKENS, dtype=np.int32)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    with tempfile.TemporaryDirectory() as folder:
        written = dataclasses.replace(config, slope_rule=TRANSFORMERS)
        read = lambda path, box: leaves[path][box]  # noqa: E731
        Export(written, read, Path(folder), "twin", TRANSFORMERS).run(progress=lambda _: None)
        model = load_in_transformers(Path(folder))
    with corrected(model, config), torch.no_grad():
        theirs = model(torch.tensor(tokens).long(), use_cache=False).logits.numpy()

    @jax.jit
    def logits(params: Any, tokens: Any) -> jax.Array:
        model = bind(config, params)
        return model.logits(model(tokens)[0])

    return float(np.abs(np.asarray(logits(params, tokens)) - theirs).max())


def load_in_transformers(folder: Path) -> Any:
    """Transformers' model of a directory, fp32.

    Raises:
      ConfigError: if it misses tensors other than those it derives, or finds some that it does not know.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.MiniMaxForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    missing = [name for name in info["missing_keys"] if not DERIVED_TENSORS.search(name)]
    wrong = sorted([*missing, *info["unexpected_keys"], *map(str, info["mismatched_keys"])])
    if wrong:
        raise ConfigError(f"Transformers does not find in {folder} what it looks for: {', '.join(wrong[:3])}")
    return model.eval()


@contextlib.contextmanager
def corrected(model: Any, config: ModelConfig) -> Iterator[None]:
    """A ``MiniMaxForCausalLM`` with partial RoPE and the configuration's own slopes, within the scope."""
    import torch
    from transformers.models.minimax import modeling_minimax

    exponents = torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim
    model.model.rotary_emb.inv_freq = config.rope_base**-exponents
    for number, layer in enumerate(model.model.layers):
        if config.layer_pattern[number] == LIGHTNING:
            slopes = layer_slopes(config.num_heads, number, config.num_layers, config.slope_rule)
            _set_slopes(layer.self_attn, torch.tensor(slopes)[:, None, None])
    partial_rope = functools.partial(_partial_rope, config.rotary_dim, modeling_minimax.rotate_half)
    whole_rope = modeling_minimax.apply_rotary_pos_emb
    modeling_minimax.apply_rotary_pos_emb = partial_rope
    try:
        yield
    finally:
        modeling_minimax.apply_rotary_pos_emb = whole_rope


def _partial_rope(rotary_dim: int, rotate_half: Any, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
    import torch

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotate(x: Any) -> Any:
        head, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        return torch.cat([head * cos + rotate_half(head) * sin, rest], dim=-1)

    return rotate(q), rotate(k)


def _set_slopes(attention: Any, slope_H11: Any) -> None:
    attention.slope_rate = slope_H11
    attention.query_decay, attention.key_decay, attention.diagonal_decay = attention.decay_factors(slope_H11)
