"""Cross-entropy of the next token straight from hidden states, without the logits of a whole batch.

Shapes: T tokens, D hidden channels, V vocabulary.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy.blocked import cross_entropy_blocked
from pallas_kernels.cross_entropy.reference import cross_entropy_reference
from pallas_kernels.platform import target_platform

IMPLEMENTATIONS = ("auto", "reference", "blocked")

# Bytes of fp32 logits that may exist at once, by target platform.
_LOGITS_BYTES = {"cpu": 2**25, "gpu": 2**29, "tpu": 2**28}


def cross_entropy(
    x_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    *,
    logits_dtype: jnp.dtype = jnp.float32,
    vocab_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """``sum_t weights[t] * -log softmax(x[t] @ head^T)[targets[t]]``.

    Args:
      x_TD: final hidden states.
      head_VD: output embedding, x's dtype.
      targets_T: int32 next tokens, each in the vocabulary; where there is none, any valid token with weight 0.
      weights_T: fp32 weight of each token.
      logits_dtype: what the logits, accumulated in fp32, are rounded to before the softmax.
      vocab_axis: inside ``shard_map``, the mesh axis over which the vocabulary is split: ``head_VD`` is this device's
        part, targets are of the whole, and x, targets and weights are the same along the axis. Cotangents follow
        ``shard_map``'s convention: that of the result is summed over the axis, that of x is this device's part.
      implementation: "auto", or one of ``IMPLEMENTATIONS`` to force it.

    Returns:
      The scalar sum, fp32 (float64 for float64 inputs). Differentiable in x, head and weights.

    Raises:
      ValueError: if shapes or dtypes do not fit, or the implementation is unknown.
    """
    (T, D), V = x_TD.shape, head_VD.shape[0]
    if head_VD.shape != (V, D) or targets_T.shape != (T,) or weights_T.shape != (T,) or x_TD.dtype != head_VD.dtype:
        raise ValueError(
            f"x {x_TD.shape} {x_TD.dtype}, head {head_VD.shape} {head_VD.dtype}, targets {targets_T.shape} and weights "
            f"{weights_T.shape} do not fit: need [T, D], [V, D] of one dtype, [T] and [T]"
        )
    if vocab_axis is not None and implementation == "reference":
        raise ValueError('implementation="reference" does not split the vocabulary: use "auto" or "blocked"')
    if implementation == "reference":
        return cross_entropy_reference(x_TD, head_VD, targets_T, weights_T, logits_dtype)
    if implementation in ("auto", "blocked"):
        block = max(16, _LOGITS_BYTES[target_platform()] // (4 * V))
        block = _even_block(T, block)
        return cross_entropy_blocked(x_TD, head_VD, targets_T, weights_T, logits_dtype, block, vocab_axis)
    raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")


def _even_block(tokens: int, most: int) -> int:
    """Tokens in a block, at most about ``most``, such that the last block is hardly padded."""
    blocks = -(-tokens // most)
    return -(-tokens // blocks)
