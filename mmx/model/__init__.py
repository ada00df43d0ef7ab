"""The model: norm, RoPE, both attentions, router, experts, block, stack."""
