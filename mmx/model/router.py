"""The router: which experts a token goes to, with what weights, and the statistics that balance them.

Report Eq. 1 and section 2.2; released code. All in fp32. Shapes: ... leading dimensions (batch and perhaps sequence),
D hidden, E experts, J chosen experts a token, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from mmx.config import ModelConfig
from mmx.model.parameters import weight, xavier


class Routing(NamedTuple):
    """A token's experts, best first, and their weights, which sum to 1."""

    experts_J: jax.Array  # int32 [..., J]
    weights_J: jax.Array  # fp32 [..., J]


class RouterLoad(NamedTuple):
    """What the auxiliary loss and the metrics need of one layer."""

    # Assignments to each expert over tokens, f_i of the report; sums to J.
    share_E: jax.Array
    # Mean routing probability of each expert, m_i of the report; sums to 1.
    probability_E: jax.Array


class Router(nnx.Module):
    """Top-J of a softmax over all experts, renormalised. Its matrix stays fp32 whatever the parameters' dtype is."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, E = config.hidden_size, config.num_experts
        self.experts_per_token = config.experts_per_token
        self.gate = xavier(key, (D, E), ("hidden", None), "float32", fan_in=D, fan_out=E)

    def __call__(self, x: jax.Array, valid: jax.Array | None) -> tuple[Routing, RouterLoad]:
        """Routes tokens.

        Args:
          x: tokens [..., D].
          valid: bool [...], tokens that count for the load; None counts all.
        """
        dtype = jnp.promote_types(jnp.float32, x.dtype)
        logits_E = jnp.einsum("...d,de->...e", x.astype(dtype), weight(self.gate, dtype), precision="highest")
        probabilities_E = jax.nn.softmax(logits_E, axis=-1)
        _, experts_J = lax.top_k(probabilities_E, self.experts_per_token)
        chosen_JE = jax.nn.one_hot(experts_J, probabilities_E.shape[-1], dtype=dtype)
        weights_J = jnp.sum(chosen_JE * probabilities_E[..., None, :], axis=-1)
        weights_J /= jnp.sum(weights_J, axis=-1, keepdims=True)

        tokens = tuple(range(x.ndim - 1))
        counted = jnp.ones(x.shape[:-1], dtype) if valid is None else valid.astype(dtype)
        total = jnp.maximum(jnp.sum(counted), 1)
        load = RouterLoad(
            share_E=jnp.sum(chosen_JE.sum(-2) * counted[..., None], axis=tokens) / total,
            probability_E=jnp.sum(probabilities_E * counted[..., None], axis=tokens) / total,
        )
        return Routing(experts_J, weights_J), load


def auxiliary_loss(load: RouterLoad, form: str) -> jax.Array:
    """The load-balancing loss, before its coefficient.

    Args:
      load: statistics with a leading layer dimension, [L, E] each.
      form: "paper" is (1/E) sum_i f_i m_i of each layer, summed over layers (report section 2.2, after GShard).
        "released" is E sum_i f_i P_i with f and P averaged over layers first (released code). For one layer the second
        is E^2 times the first.
    """
    num_experts = load.share_E.shape[-1]
    # Only the probabilities carry a gradient: the shares are counts.
    share_LE = lax.stop_gradient(load.share_E)
    if form == "paper":
        return jnp.sum(share_LE * load.probability_E) / num_experts
    if form == "released":
        return num_experts * jnp.sum(share_LE.mean(0) * load.probability_E.mean(0))
    raise ValueError(f"unknown form {form!r} of the auxiliary loss")
