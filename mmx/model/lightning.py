"""The lightning attention layer (report section 2.2.2; released modelling code).

SiLU on queries, keys and values; constant decay; RMSNorm over all heads together; sigmoid gate; output projection. No
RoPE, no scale, no biases. Shapes: B batch, S tokens, D hidden, H heads, K head channels.
"""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmx.config import ModelConfig
from mmx.model.activation import sigmoid_gate, silu
from mmx.model.layout import HEADS_OF_TOKENS, SLICES, heads_axes, stream_axes
from mmx.model.linear import linear
from mmx.model.norm import RMSNorm
from mmx.model.parameters import deepnorm_gain, weight, xavier
from mmx.parallel import axis_size, constrain, island
from mmx.parallel.lasp import lasp_plus
from mmx.parallel.sequence_layout import SequenceLayout
from pallas_kernels.lightning_attention import lightning_attention, lightning_attention_step

# The released class default; the configured eps does not reach this norm.
OUTPUT_NORM_EPS = 1e-6


class LightningAttention(nnx.Module):
    """One lightning attention layer. Its state is one K x K matrix a head, fp32."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, H, K, dtype = config.hidden_size, config.num_heads, config.head_dim, config.param_dtype
        keys = jax.random.split(key, 5)
        gain = deepnorm_gain(config.num_layers)
        axes = ("hidden", "heads", None)
        fans = {"fan_in": D, "fan_out": H * K}
        self.query = xavier(keys[0], (D, H, K), axes, dtype, **fans)
        self.key = xavier(keys[1], (D, H, K), axes, dtype, **fans)
        self.value = xavier(keys[2], (D, H, K), axes, dtype, gain=gain, **fans)
        self.gate = xavier(keys[3], (D, H, K), axes, dtype, **fans)
        self.norm = RMSNorm(H * K, OUTPUT_NORM_EPS, dtype)
        self.out = xavier(keys[4], (H, K, D), ("heads", None, "hidden"), dtype, fan_in=H * K, fan_out=D, gain=gain)
        self.layout = SequenceLayout(config.sequence_layout)

    def __call__(
        self,
        x_BSD: jax.Array,
        slopes_H: jax.Array,
        segment_ids_BS: jax.Array | None,
        slice_ids_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Mixes the tokens of each document.

        Args:
          x_BSD: normalised input.
          slopes_H: this layer's decay slopes.
          segment_ids_BS: document ids, or None for one document a row.
          slice_ids_BT: slices of each row in the order of the ranks, in a layout that depends on the documents.

        Returns:
          The branch's output [B, S, D], and the state after the last token [B, H, K, K]; None where rows are split
          over ``context``.
        """
        x_BSD = constrain(x_BSD, "batch", "attention_sequence", None)
        qkv = self._project(x_BSD)
        in_axes = (*[HEADS_OF_TOKENS] * 3, ("heads",), HEADS_OF_TOKENS[:2])
        if axis_size("context") > 1:
            lasp = island(self._lasp, (*in_axes, SLICES), HEADS_OF_TOKENS)
            o_BSHK, state_BHKK = lasp(*qkv, slopes_H, segment_ids_BS, slice_ids_BT), None
        else:
            attend = island(
                lambda q, k, v, slopes, segments: lightning_attention(q, k, v, slopes, segment_ids_BS=segments),
                in_axes,
                (HEADS_OF_TOKENS, ("batch", "heads", None, None)),
            )
            o_BSHK, state_BHKK = attend(*qkv, slopes_H, segment_ids_BS)
        return self._finish(x_BSD, checkpoint_name(o_BSHK, "attention")), state_BHKK

    def _lasp(self, q_BSHK, k_BSHK, v_BSHK, slopes_H, segment_ids_BS, slice_ids_BN):
        operands = q_BSHK, k_BSHK, v_BSHK, slopes_H, segment_ids_BS
        return lasp_plus(*operands, axis="context", layout=self.layout, slice_ids_BN=slice_ids_BN)

    def step(self, x_BD: jax.Array, slopes_H: jax.Array, state_BHKK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One token of each row: its output [B, D] and the state after it."""
        q_BHK, k_BHK, v_BHK = self._project(x_BD)
        o_BHK, state_BHKK = lightning_attention_step(q_BHK, k_BHK, v_BHK, slopes_H, state_BHKK)
        return self._finish(x_BD, o_BHK), state_BHKK

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        axes = heads_axes(x.ndim)
        q, k, v = (silu(linear(x, weight(param, x.dtype), axes)) for param in (self.query, self.key, self.value))
        return q, k, v

    def _finish(self, x: jax.Array, o: jax.Array) -> jax.Array:
        gate = linear(x, weight(self.gate, x.dtype), heads_axes(x.ndim))
        normed = self.norm(o.reshape(*o.shape[:-2], -1)).reshape(o.shape)
        return linear(sigmoid_gate(normed, gate), weight(self.out, x.dtype), stream_axes(x.ndim), contract=2)
