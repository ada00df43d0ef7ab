"""Transformers' MiniMax class as an oracle for the text model, with what it gets wrong put right in this process.

Its class rotates all channels of a head, and takes slopes by another rule for head counts that are no power of two; the
released code does neither. Both are corrected here, on the objects, never in the installed package.
"""

import contextlib
from unittest import mock

import jax
import numpy as np
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax import modeling_minimax

from mmx.config import LIGHTNING, ModelConfig
from mmx.model.text import layer_runs
from pallas_kernels.lightning_attention import layer_slopes


@contextlib.contextmanager
def oracle(config: ModelConfig, seed: int = 0):
    """A random Transformers model of the configuration, fp32, with partial RoPE and the released slopes."""
    torch.manual_seed(seed)
    model = MiniMaxForCausalLM(
        MiniMaxConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.experts_per_token,
            layer_types=[f"{'linear' if k == LIGHTNING else 'full'}_attention" for k in config.layer_pattern],
            rms_norm_eps=config.norm_eps,
            linear_attn_alpha_factor=config.alpha("lightning"),
            full_attn_alpha_factor=config.alpha("softmax"),
            mlp_alpha_factor=config.alpha("experts"),
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=0.1,
            block_size=16,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # Ones would hide a norm that is left out.
                parameter.add_(0.2 * torch.randn_like(parameter))
    exponents = torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim
    model.model.rotary_emb.inv_freq = config.rope_base**-exponents
    for number, layer in enumerate(model.model.layers):
        if config.layer_pattern[number] == LIGHTNING:
            _set_slopes(layer.self_attn, layer_slopes(config.num_heads, number, config.num_layers))
    with mock.patch.object(modeling_minimax, "apply_rotary_pos_emb", _partial_rope(config.rotary_dim)):
        yield model


def _partial_rope(rotary_dim: int):
    def apply(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

        def rotate(x):
            head, rest = x[..., :rotary_dim], x[..., rotary_dim:]
            return torch.cat([head * cos + modeling_minimax.rotate_half(head) * sin, rest], dim=-1)

        return rotate(q), rotate(k)

    return apply


def _set_slopes(attention, slopes: np.ndarray) -> None:
    slope = torch.tensor(slopes)[:, None, None]
    attention.slope_rate = slope
    attention.query_decay, attention.key_decay, attention.diagonal_decay = attention.decay_factors(slope)


def to_mmx(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict:
    """Parameters, or gradients, by Transformers' names in our tree: stacked, transposed, split."""
    D, H, G, K = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim

    def project(name: str, heads: int) -> np.ndarray:
        return tensors[name].reshape(heads, K, D).transpose(2, 0, 1)

    def attention(number: int) -> dict:
        at = f"model.layers.{number}.self_attn."
        if config.layer_pattern[number] != LIGHTNING:
            out = tensors[at + "o_proj.weight"].reshape(D, H, K).transpose(1, 2, 0)
            return {
                "query": project(at + "q_proj.weight", H),
                "key": project(at + "k_proj.weight", G),
                "value": project(at + "v_proj.weight", G),
                "out": out,
            }
        packed = tensors[at + "qkv_proj.weight"].reshape(H, 3, K, D)
        q, k, v = (packed[:, part].transpose(2, 0, 1) for part in range(3))
        out = tensors[at + "out_proj.weight"].reshape(D, H, K).transpose(1, 2, 0)
        norm, gate = {"scale": tensors[at + "norm.weight"]}, project(at + "output_gate.weight", H)
        return {"query": q, "key": k, "value": v, "gate": gate, "norm": norm, "out": out}

    def layer(number: int) -> dict:
        at = f"model.layers.{number}."
        gate_up = tensors[at + "mlp.experts.gate_up_proj"].reshape(config.num_experts, 2, -1, D)
        return {
            "attention_norm": {"scale": tensors[at + "input_layernorm.weight"]},
            "attention": attention(number),
            "experts_norm": {"scale": tensors[at + "post_attention_layernorm.weight"]},
            "experts": {
                "router": {"gate": tensors[at + "mlp.gate.weight"].T},
                "gate_up": gate_up.transpose(0, 3, 1, 2),
                "down": tensors[at + "mlp.experts.down_proj"].transpose(0, 2, 1),
            },
        }

    periods, runs = layer_runs(config.layer_pattern)
    per_period = config.num_layers // periods
    stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)  # noqa: E731
    params = {
        "embedding": tensors["model.embed_tokens.weight"],
        "final_norm": {"scale": tensors["model.norm.weight"]},
        "runs": {
            run.name: stack(
                [
                    stack([layer(period * per_period + run.start + n) for n in range(run.length)])
                    for period in range(periods)
                ]
            )
            for run in runs
        },
    }
    if not config.tie_embeddings:
        params["head"] = tensors["lm_head.weight"]
    return params
