"""Causal softmax attention with grouped key-value heads."""

from pallas_kernels.softmax_attention.decode import softmax_attention_step
from pallas_kernels.softmax_attention.op import IMPLEMENTATIONS, softmax_attention
from pallas_kernels.softmax_attention.pairs import SOFTMAX_RESIDUALS

__all__ = ["IMPLEMENTATIONS", "SOFTMAX_RESIDUALS", "softmax_attention", "softmax_attention_step"]
