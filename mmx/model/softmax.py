"""The softmax attention layer: grouped key-value heads, RoPE on part of each head (report section 2; released code).

Shapes: B batch, S tokens, T cache slots, D hidden, H query heads, G key-value heads, K head channels.
"""

from typing import NamedTuple

import jax
from flax import nnx

from mmx.config import ModelConfig
from mmx.model.layout import HEADS_OF_TOKENS, SLICES, heads_axes, stream_axes
from mmx.model.linear import linear
from mmx.model.parameters import deepnorm_gain, weight, xavier
from mmx.model.rope import RopeTable, apply_rope
from mmx.parallel import axis_size, constrain, island
from mmx.parallel.ring import ring_attention
from mmx.parallel.sequence_layout import SequenceLayout
from pallas_kernels.softmax_attention import softmax_attention, softmax_attention_step


class KeyValues(NamedTuple):
    """Keys, rotated, and values of a row's tokens, [B, T, G, K] each."""

    k_BTGK: jax.Array
    v_BTGK: jax.Array


class SoftmaxAttention(nnx.Module):
    """One softmax attention layer, scale 1/sqrt(K), no biases."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, H, G, K = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        dtype, gain = config.param_dtype, deepnorm_gain(config.num_layers)
        keys = jax.random.split(key, 4)
        axes = ("hidden", "heads", None)
        self.query = xavier(keys[0], (D, H, K), axes, dtype, fan_in=D, fan_out=H * K)
        self.key = xavier(keys[1], (D, G, K), axes, dtype, fan_in=D, fan_out=G * K)
        self.value = xavier(keys[2], (D, G, K), axes, dtype, fan_in=D, fan_out=G * K, gain=gain)
        self.out = xavier(keys[3], (H, K, D), ("heads", None, "hidden"), dtype, fan_in=H * K, fan_out=D, gain=gain)
        self.layout = SequenceLayout(config.sequence_layout)

    def __call__(
        self,
        x_BSD: jax.Array,
        rope: RopeTable,
        segment_ids_BS: jax.Array | None,
        slice_ids_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Causal attention within each document.

        Args:
          x_BSD: normalised input.
          rope: table of the tokens' positions.
          segment_ids_BS: document ids, or None for one document a row.
          slice_ids_BT: slices of each row in the order of the ranks, in a layout that depends on the documents.

        Returns:
          The branch's output [B, S, D], and the tokens' keys and values for a cache.
        """
        q_BSHK, k_BSGK, v_BSGK = self._project(constrain(x_BSD, "batch", "attention_sequence", None), rope)
        attend = island(self._attend, (*[HEADS_OF_TOKENS] * 3, HEADS_OF_TOKENS[:2], SLICES), HEADS_OF_TOKENS)
        o_BSHK = attend(q_BSHK, k_BSGK, v_BSGK, segment_ids_BS, slice_ids_BT)
        return self._finish(o_BSHK), KeyValues(k_BSGK, v_BSGK)

    def _attend(self, q_BSHK, k_BSGK, v_BSGK, segment_ids_BS, slice_ids_BN):
        # Both name their result themselves, together with what their backward pass needs.
        if axis_size("context") > 1:
            operands = q_BSHK, k_BSGK, v_BSGK, segment_ids_BS
            return ring_attention(*operands, axis="context", layout=self.layout, slice_ids_BN=slice_ids_BN)
        return softmax_attention(q_BSHK, k_BSGK, v_BSGK, segment_ids_BS=segment_ids_BS)

    def step(
        self, x_BD: jax.Array, rope: RopeTable, cache: KeyValues, slot: jax.Array, valid_BT: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        """One token of each row: its output [B, D] and the cache with it in ``slot``.

        Args:
          slot: where the token goes, the same for all rows; int32 scalar.
          valid_BT: slots that the token may see, its own included.
        """
        q_BHK, k_BGK, v_BGK = self._project(x_BD, rope)
        cache = KeyValues(
            *(
                jax.lax.dynamic_update_slice_in_dim(
                    old, constrain(new[:, None].astype(old.dtype), *HEADS_OF_TOKENS), slot, axis=1
                )
                for old, new in zip(cache, (k_BGK, v_BGK), strict=True)
            )
        )
        heads, slots = ("batch", "heads", None), ("batch", None, "heads", None)
        attend = island(softmax_attention_step, (heads, slots, slots, ("batch", None)), heads)
        return self._finish(attend(q_BHK, *cache, valid_BT).astype(x_BD.dtype)), cache

    def _project(self, x: jax.Array, rope: RopeTable) -> tuple[jax.Array, jax.Array, jax.Array]:
        axes = heads_axes(x.ndim)
        q, k, v = (linear(x, weight(param, x.dtype), axes) for param in (self.query, self.key, self.value))
        return apply_rope(q, rope), apply_rope(k, rope), v

    def _finish(self, o: jax.Array) -> jax.Array:
        return linear(o, weight(self.out, o.dtype), stream_axes(o.ndim - 1), contract=2)
