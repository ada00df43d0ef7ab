"""The mixture of experts: SwiGLU experts, dropless or with a capacity (report section 2.2).

Shapes: B batch, S tokens, D hidden, E experts, F expert hidden, J chosen experts a token, T tokens, M rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmx.config import ModelConfig
from mmx.model.activation import swiglu
from mmx.model.dispatch import plan_dispatch, rows_from_tokens, tokens_from_rows
from mmx.model.parameters import deepnorm_gain, weight, xavier
from mmx.model.router import Router, RouterLoad
from mmx.parallel import island
from pallas_kernels.grouped_matmul import grouped_matmul


class ExpertStats(NamedTuple):
    """What a layer of experts reports."""

    load: RouterLoad
    dropped: jax.Array  # share of assignments that found no room, fp32 scalar


class Experts(nnx.Module):
    """y = sum of the chosen experts' w2(silu(w1 x) * w3 x), weighted by the router."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, E, F, dtype = config.hidden_size, config.num_experts, config.expert_hidden_size, config.param_dtype
        keys = jax.random.split(key, 3)
        gain = deepnorm_gain(config.num_layers)
        self.capacity_factor = config.capacity_factor
        self.router = Router(config, keys[0])
        # w1 (gate) and w3 (up) of each expert side by side: one product makes both.
        self.gate_up = xavier(
            keys[1], (E, D, 2, F), ("experts", "hidden", None, "expert_hidden"), dtype, fan_in=D, fan_out=F, gain=gain
        )
        self.down = xavier(
            keys[2], (E, F, D), ("experts", "expert_hidden", "hidden"), dtype, fan_in=F, fan_out=D, gain=gain
        )

    def __call__(self, x: jax.Array, valid: jax.Array | None, *, dropless: bool) -> tuple[jax.Array, ExpertStats]:
        """Routes tokens through their experts.

        Args:
          x: normalised input, [B, S, D] or [B, D].
          valid: bool, tokens that count for the load; None counts all.
          dropless: True ignores the capacity, as inference does.

        Returns:
          The branch's output in x's shape and dtype, and the layer's statistics.
        """
        routing, load = self.router(x, valid)
        routing = jax.tree.map(lambda a: checkpoint_name(a, "routing"), routing)
        factor = 0.0 if dropless else self.capacity_factor
        tokens = ("batch", "sequence", None) if x.ndim == 3 else ("batch", None)
        run = island(
            lambda *arguments: _run_experts(*arguments, capacity_factor=factor),
            (tokens, tokens, tokens, ("experts", None, None, None), ("experts", None, None)),
            (tokens, tokens),
        )
        weights = weight(self.gate_up, x.dtype), weight(self.down, x.dtype)
        y, kept = run(x, routing.experts_J, routing.weights_J, *weights)
        return y, ExpertStats(load, 1.0 - jnp.mean(kept.astype(jnp.float32)))


def _run_experts(x, experts_J, weights_J, gate_up_ED2F, down_EFD, *, capacity_factor: float):
    """The experts on one device's tokens. Returns the output and which assignments were kept."""
    E, J = gate_up_ED2F.shape[0], experts_J.shape[-1]
    x_TD, experts_TJ, weights_TJ = (rearrange(a, "... c -> (...) c") for a in (x, experts_J, weights_J))
    T = x_TD.shape[0]
    capacity = math.ceil(capacity_factor * T * J / E) if capacity_factor else None
    dispatch = plan_dispatch(experts_TJ, E, capacity)
    rows_MD = rows_from_tokens(x_TD, dispatch)
    hidden_M2F = _expand(rows_MD, gate_up_ED2F, dispatch.group_sizes_E)
    rows_MD = grouped_matmul(swiglu(hidden_M2F), down_EFD, dispatch.group_sizes_E)
    y_TD = tokens_from_rows(rows_MD, weights_TJ, dispatch).astype(x.dtype)
    return y_TD.reshape(x.shape), dispatch.kept_TJ.reshape(experts_J.shape)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _expand(rows_MD: jax.Array, gate_up_ED2F: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    # Checkpointed so that the weights are kept as they came in: a scan over layers would copy their reshaped form.
    return grouped_matmul(rows_MD, rearrange(gate_up_ED2F, "e d two f -> e d (two f)"), group_sizes_E)
