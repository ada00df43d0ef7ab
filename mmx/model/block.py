"""One layer: attention of either kind, then experts, joined by DeepNorm or pre-norm residuals.

Under postnorm the residual is the normalised input, ``h = alpha * norm(x) + beta * branch(norm(x))``, as in the
released code; under pre-norm it is the raw input. Shapes: B batch, S tokens, T cache slots, D hidden, H heads.
"""

from typing import Any, NamedTuple

import jax
from flax import nnx

from mmx.config import LIGHTNING, ModelConfig
from mmx.model.experts import Experts, ExpertStats
from mmx.model.lightning import LightningAttention
from mmx.model.norm import RMSNorm
from mmx.model.rope import RopeTable
from mmx.model.softmax import SoftmaxAttention


class Tokens(NamedTuple):
    """What every layer needs to know of the tokens of a batch."""

    rope: RopeTable
    segment_ids_BS: jax.Array | None
    slice_ids_BT: jax.Array | None  # slices of each row in the order of the ranks, where the layout needs them
    valid_BS: jax.Array | None  # tokens that count for the router's load


class Step(NamedTuple):
    """What every layer needs to know of one decoding step."""

    rope: RopeTable
    slot: jax.Array  # where the token goes in the key-value cache, int32 scalar
    valid_BT: jax.Array  # slots that the token may see


class Block(nnx.Module):
    """One layer of the stack, of kind "lightning" or "softmax"."""

    def __init__(self, config: ModelConfig, kind: str, key: jax.Array):
        attention_key, experts_key = jax.random.split(key)
        self.kind = kind
        self.postnorm = config.postnorm
        self.attention_scales = config.alpha(kind), config.beta(kind)
        self.experts_scales = config.alpha("experts"), config.beta("experts")
        norm = lambda: RMSNorm(config.hidden_size, config.norm_eps, config.param_dtype)  # noqa: E731
        self.attention_norm = norm()
        self.attention = (LightningAttention if kind == LIGHTNING else SoftmaxAttention)(config, attention_key)
        self.experts_norm = norm()
        self.experts = Experts(config, experts_key)

    def __call__(
        self, x_BSD: jax.Array, slopes_H: jax.Array, tokens: Tokens, *, dropless: bool
    ) -> tuple[jax.Array, ExpertStats, Any]:
        """The layer over whole rows.

        Args:
          slopes_H: decay slopes; read by lightning layers only.
          dropless: True ignores the experts' capacity.

        Returns:
          Its output, the experts' statistics, and what attention leaves for a cache.
        """
        normed = self.attention_norm(x_BSD)
        if self.kind == LIGHTNING:
            branch, cache = self.attention(normed, slopes_H, tokens.segment_ids_BS, tokens.slice_ids_BT)
        else:
            branch, cache = self.attention(normed, tokens.rope, tokens.segment_ids_BS, tokens.slice_ids_BT)
        x_BSD = self._join(x_BSD, normed, branch, self.attention_scales)
        normed = self.experts_norm(x_BSD)
        branch, stats = self.experts(normed, tokens.valid_BS, dropless=dropless, slice_ids_BT=tokens.slice_ids_BT)
        return self._join(x_BSD, normed, branch, self.experts_scales), stats, cache

    def step(self, x_BD: jax.Array, slopes_H: jax.Array, cache: Any, step: Step) -> tuple[jax.Array, Any]:
        """One token of each row: the layer's output [B, D] and its cache after the token."""
        normed = self.attention_norm(x_BD)
        if self.kind == LIGHTNING:
            branch, cache = self.attention.step(normed, slopes_H, cache)
        else:
            branch, cache = self.attention.step(normed, step.rope, cache, step.slot, step.valid_BT)
        x_BD = self._join(x_BD, normed, branch, self.attention_scales)
        normed = self.experts_norm(x_BD)
        branch, _ = self.experts(normed, None, dropless=True)
        return self._join(x_BD, normed, branch, self.experts_scales), cache

    def _join(self, x: jax.Array, normed: jax.Array, branch: jax.Array, scales: tuple[float, float]) -> jax.Array:
        alpha, beta = scales
        return alpha * (normed if self.postnorm else x) + beta * branch
