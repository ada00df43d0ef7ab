"""Cross-entropy of the next token straight from hidden states."""

from pallas_kernels.cross_entropy.op import IMPLEMENTATIONS, cross_entropy

__all__ = ["IMPLEMENTATIONS", "cross_entropy"]
