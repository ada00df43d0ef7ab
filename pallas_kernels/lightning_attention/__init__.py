"""Lightning attention: linear attention with a constant decay a head."""

from pallas_kernels.lightning_attention.decay import head_slopes, layer_factor, layer_slopes
from pallas_kernels.lightning_attention.decode import lightning_attention_extend, lightning_attention_step
from pallas_kernels.lightning_attention.op import IMPLEMENTATIONS, lightning_attention
from pallas_kernels.lightning_attention.tpu import LIGHTNING_STATES

__all__ = [
    "IMPLEMENTATIONS",
    "LIGHTNING_STATES",
    "head_slopes",
    "layer_factor",
    "layer_slopes",
    "lightning_attention",
    "lightning_attention_extend",
    "lightning_attention_step",
]
