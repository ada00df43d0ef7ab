"""The mixture of experts: SwiGLU experts, dropless or with a capacity (report section 2.2).

On a mesh the tokens of one device go through ``mmx.parallel.exchange`` to the devices that hold their experts.

Shapes: B batch, S tokens, D hidden, E experts, N experts of one device, F expert hidden (of one device), J chosen
experts a token, T tokens, M rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmx.config import ModelConfig
from mmx.model.activation import swiglu
from mmx.model.layout import SLICES
from mmx.model.parameters import deepnorm_gain, xavier
from mmx.model.router import Router, RouterLoad
from mmx.parallel import gather_in_island, island, stored_axes
from mmx.parallel.exchange import Assignments, choose_body, even_share, exchange
from mmx.parallel.global_router import globally_kept
from mmx.parallel.sequence_layout import SequenceLayout
from pallas_kernels.grouped_matmul import grouped_matmul


class ExpertStats(NamedTuple):
    """What a layer of experts reports."""

    load: RouterLoad
    dropped: jax.Array  # share of assignments that found no room, fp32 scalar


_GATE_UP = ("experts", "hidden", None, "expert_hidden")
_DOWN = ("experts", "expert_hidden", "hidden")


class Experts(nnx.Module):
    """y = sum of the chosen experts' w2(silu(w1 x) * w3 x), weighted by the router."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, E, F, dtype = config.hidden_size, config.num_experts, config.expert_hidden_size, config.param_dtype
        keys = jax.random.split(key, 3)
        gain = deepnorm_gain(config.num_layers)
        self.config = config
        self.router = Router(config, keys[0])
        # w1 (gate) and w3 (up) of each expert side by side: one product makes both.
        self.gate_up = xavier(keys[1], (E, D, 2, F), _GATE_UP, dtype, fan_in=D, fan_out=F, gain=gain)
        self.down = xavier(keys[2], (E, F, D), _DOWN, dtype, fan_in=F, fan_out=D, gain=gain)

    def __call__(
        self, x: jax.Array, valid: jax.Array | None, *, dropless: bool, slice_ids_BT: jax.Array | None = None
    ) -> tuple[jax.Array, ExpertStats]:
        """Routes tokens through their experts.

        Args:
          x: normalised input, [B, S, D] or [B, D].
          valid: bool, tokens that count for the load; None counts all.
          dropless: True ignores the capacity, as inference does.
          slice_ids_BT: slices of each row in the order of the ranks, in a layout that depends on the documents.

        Returns:
          The branch's output in x's shape and dtype, and the layer's statistics.
        """
        routing, load = self.router(x, valid)
        routing = jax.tree.map(lambda a: checkpoint_name(a, "routing"), routing)
        tokens = ("batch", "sequence", None) if x.ndim == 3 else ("batch", None)
        run = island(
            functools.partial(_run_experts, self.config, dropless),
            (tokens, tokens, tokens, stored_axes(_GATE_UP), stored_axes(_DOWN), SLICES),
            (tokens, tokens),
        )
        y, kept = run(x, routing.experts_J, routing.weights_J, self.gate_up[...], self.down[...], slice_ids_BT)
        return y, ExpertStats(load, 1.0 - jnp.mean(kept.astype(jnp.float32)))


def _run_experts(config: ModelConfig, dropless: bool, x, experts_J, weights_J, gate_up_NDF, down_NFD, slice_ids_BL):
    """The experts' results for one device's tokens, and which assignments were kept."""
    factor = 0.0 if dropless else config.capacity_factor
    E, J, T = config.num_experts, config.experts_per_token, x.size // x.shape[-1]
    # A few tokens, as in decoding, are not worth cutting.
    groups = config.exchange_groups if T % config.exchange_groups == 0 else 1
    kept_J, capacity = None, None
    if factor and config.global_router:
        kept_J = globally_kept(experts_J, E, factor, SequenceLayout(config.sequence_layout), slice_ids_BL)
    elif factor:
        capacity = even_share(T // groups, J, E, factor)
    flatten = lambda a: None if a is None else rearrange(a, "... c -> (...) c")  # noqa: E731
    weights = gather_in_island(gate_up_NDF, _GATE_UP, x.dtype), gather_in_island(down_NFD, _DOWN, x.dtype)
    y_TD, kept_TJ = exchange(
        flatten(x),
        Assignments(flatten(experts_J), flatten(weights_J), flatten(kept_J)),
        _LocalExperts(*weights),
        num_experts=E,
        capacity=capacity,
        body=choose_body(config.expert_exchange, bool(factor), config.global_router),
        groups=groups,
    )
    return y_TD.astype(x.dtype).reshape(x.shape), kept_TJ.reshape(experts_J.shape)


class _LocalExperts(NamedTuple):
    """w2(silu(w1 x) * w3 x) for the experts of one device."""

    gate_up_ND2F: jax.Array
    down_NFD: jax.Array

    def grouped(self, rows_MD: jax.Array, group_sizes_N: jax.Array) -> jax.Array:
        hidden_M2F = _expand(rows_MD, self.gate_up_ND2F, group_sizes_N)
        return grouped_matmul(swiglu(hidden_M2F), self.down_NFD, group_sizes_N)

    def batched(self, rows_NMD: jax.Array) -> jax.Array:
        hidden_NM2F = _expand_batched(rows_NMD, self.gate_up_ND2F)
        return jnp.einsum("nmf,nfd->nmd", swiglu(hidden_NM2F), self.down_NFD)


# Checkpointed so that the weights are kept as they came in: a scan over layers would copy their reshaped forms.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _expand(rows_MD: jax.Array, gate_up_ND2F: jax.Array, group_sizes_N: jax.Array) -> jax.Array:
    return grouped_matmul(rows_MD, rearrange(gate_up_ND2F, "n d two f -> n d (two f)"), group_sizes_N)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _expand_batched(rows_NMD: jax.Array, gate_up_ND2F: jax.Array) -> jax.Array:
    return jnp.einsum("nmd,ndf->nmf", rows_NMD, rearrange(gate_up_ND2F, "n d two f -> n d (two f)"))
