"""The lightning attention layer (report section 2.2.2; released modelling code).

SiLU on queries, keys and values; constant decay; RMSNorm over all heads together; sigmoid gate; output projection. No
RoPE, no scale, no biases.

Heads and their channels stay one dimension between the projections and the kernel, as the projections make it: an
array split into [H, K] lies otherwise in a TPU's memory, and each change is a copy of more bytes than the kernel reads.

Shapes: B batch, S tokens, D hidden, H heads, K head channels, C = H K channels of all heads.
"""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmx.config import ModelConfig
from mmx.model.activation import sigmoid_gate, silu
from mmx.model.layout import SLICES, merged_heads_axes, stream_axes
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
        channels = merged_heads_axes(3)
        attend = island(
            self._attend,
            (channels, channels, channels, ("heads",), channels[:2], SLICES),
            (channels, ("batch", "heads", None, None)) if axis_size("context") == 1 else (channels, None),
        )
        o_BSC, state_BHKK = attend(*self._project(x_BSD), slopes_H, segment_ids_BS, slice_ids_BT)
        return self._finish(x_BSD, checkpoint_name(o_BSC, "attention")), state_BHKK

    def _attend(self, q_BSC, k_BSC, v_BSC, slopes_H, segment_ids_BS, slice_ids_BN):
        """One device's heads and tokens: the output, and the last state where it has whole rows."""
        q, k, v = (x.reshape(*x.shape[:-1], slopes_H.size, -1) for x in (q_BSC, k_BSC, v_BSC))
        if axis_size("context") > 1:
            where = {"axis": "context", "layout": self.layout, "slice_ids_BN": slice_ids_BN}
            o_BSHK, state_BHKK = lasp_plus(q, k, v, slopes_H, segment_ids_BS, **where), None
        else:
            o_BSHK, state_BHKK = lightning_attention(q, k, v, slopes_H, segment_ids_BS=segment_ids_BS)
        return o_BSHK.reshape(q_BSC.shape), state_BHKK

    def step(self, x_BD: jax.Array, slopes_H: jax.Array, state_BHKK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One token of each row: its output [B, D] and the state after it."""
        qkv = (x.reshape(x.shape[0], slopes_H.size, -1) for x in self._project(x_BD))
        heads, state = ("batch", "heads", None), ("batch", "heads", None, None)
        attend = island(lightning_attention_step, (heads, heads, heads, ("heads",), state), (heads, state))
        o_BHK, state_BHKK = attend(*qkv, slopes_H, state_BHKK)
        return self._finish(x_BD, o_BHK.reshape(x_BD.shape[0], -1)), state_BHKK

    def _project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return tuple(silu(self._channels(x, param)) for param in (self.query, self.key, self.value))

    def _channels(self, x: jax.Array, param: nnx.Param) -> jax.Array:
        return linear(x, weight(param, x.dtype), merged_heads_axes(x.ndim), merged=True)

    def _finish(self, x: jax.Array, o: jax.Array) -> jax.Array:
        gated = sigmoid_gate(self.norm(o), self._channels(x, self.gate))
        return linear(gated, weight(self.out, x.dtype), stream_axes(x.ndim))
