"""What is measured: one model, three kinds of work on it, and contestants that can do them."""

from typing import Protocol

from mmx.config import ModelConfig

TRAIN, PREFILL, DECODE = "train", "prefill", "decode"
WORKS = (TRAIN, PREFILL, DECODE)
# Tokens decoded in one timed piece, one after the other.
DECODE_TOKENS = 32

# 8 layers, 7 lightning and 1 softmax; RoPE on the whole head because Transformers' class knows no other.
MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=512,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    rotary_dim=64,
    num_experts=8,
    expert_hidden_size=768,
)


class Contestant(Protocol):
    """An implementation with the model in memory, batch 1, fp32.

    ``train`` is a whole step: forward, backward, clipping by the global norm, AdamW. ``prefill`` is the forward pass
    over a prompt that fills the cache and gives the last token's logits. ``decode`` continues a prompt of the given
    length by ``DECODE_TOKENS`` tokens, one at a time.
    """

    def describe(self) -> str:
        """Name and version."""
        ...

    def run(self, work: str, length: int) -> float:
        """Does one piece of work over ``length`` tokens and returns its seconds; the first call also compiles."""
        ...
