"""One block of queries against one block of keys: the arithmetic that every blocked form is made of.

Shapes: B batch, S tokens, H query heads, G key-value heads, R = H / G, K key channels, V value channels, N blocks, C
tokens in a block (i and j index those of queries and of keys).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.platform import target_platform

# Name of the output and the log-sum-exp inside. A rematerialisation policy that keeps them saves the backward pass a
# second forward pass.
SOFTMAX_RESIDUALS = "softmax_residuals"

# Tokens in a block, by target platform.
_BLOCK = {"cpu": 256, "gpu": 1024, "tpu": 512}
# Score of a pair that may not interact. Finite, so that a difference of two of them is not a NaN.
_MASKED = -1e30
# Below any real score and far above a masked one, whose exponential is then 0 even in a row without a real score.
FLOOR = _MASKED / 2


class OnlineSoftmax(NamedTuple):
    """A block of queries and what it has taken from the keys so far."""

    o_BGRCV: jax.Array  # weighted sum of values, not divided yet
    top_BGRC: jax.Array  # largest score
    total_BGRC: jax.Array  # sum of exp(score - top)

    @classmethod
    def start(cls, q_BGRCK: jax.Array, channels: int) -> "OnlineSoftmax":
        """Nothing yet; ``channels`` is V."""
        rows, dtype = q_BGRCK.shape[:-1], accumulation_dtype(q_BGRCK)
        return cls(jnp.zeros((*rows, channels), dtype), jnp.full(rows, FLOOR, dtype), jnp.zeros(rows, dtype))

    def fold(self, scores_BGRCC: jax.Array, v_BGCV: jax.Array) -> "OnlineSoftmax":
        """With a block of keys more."""
        top = jnp.maximum(self.top_BGRC, jnp.max(scores_BGRCC, axis=-1))
        shrink = jnp.exp(self.top_BGRC - top)
        weights = jnp.exp(scores_BGRCC - top[..., None])
        part = dot("bgrij,bgjv->bgriv", weights.astype(v_BGCV.dtype), v_BGCV)
        total = self.total_BGRC * shrink + jnp.sum(weights, axis=-1)
        return OnlineSoftmax(self.o_BGRCV * shrink[..., None] + part, top, total)

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """Output, and log of the sum of exp(score); 0 and hugely negative for a query that saw no key."""
        total = jnp.maximum(self.total_BGRC, jnp.finfo(self.total_BGRC.dtype).tiny)
        return self.o_BGRCV / total[..., None], self.top_BGRC + jnp.log(total)


class PairGradients(NamedTuple):
    """What one pair of blocks adds to the gradients, in the accumulation's dtype."""

    dq_BGRCK: jax.Array
    dk_BGCK: jax.Array
    dv_BGCV: jax.Array


def pair_scores(q_BGRCK: jax.Array, k_BGCK: jax.Array, allowed_BCC: jax.Array | np.ndarray | None) -> jax.Array:
    """Scores [B, G, R, C, C] of scaled queries; ``allowed`` says who may see whom, None all."""
    scores = dot("bgrik,bgjk->bgrij", q_BGRCK, k_BGCK)
    return scores if allowed_BCC is None else jnp.where(allowed_BCC[:, None, None], scores, _MASKED)


def pair_gradients(
    scores_BGRCC: jax.Array,
    q_BGRCK: jax.Array,
    k_BGCK: jax.Array,
    v_BGCV: jax.Array,
    do_BGRCV: jax.Array,
    lse_BGRC: jax.Array,
    delta_BGRC: jax.Array,
) -> PairGradients:
    """Gradients from a pair's scores, recomputed; ``delta`` is the sum of do * o, ``q`` is scaled."""
    weights = jnp.exp(scores_BGRCC - lse_BGRC[..., None])
    dweights = dot("bgriv,bgjv->bgrij", do_BGRCV, v_BGCV)
    dscores = (weights * (dweights - delta_BGRC[..., None])).astype(q_BGRCK.dtype)
    return PairGradients(
        dot("bgrij,bgjk->bgrik", dscores, k_BGCK),
        dot("bgrij,bgrik->bgjk", dscores, q_BGRCK),
        dot("bgrij,bgriv->bgjv", weights.astype(do_BGRCV.dtype), do_BGRCV),
    )


def default_block(length: int) -> int:
    """Tokens in a block for rows of ``length`` tokens on the target platform."""
    return min(_BLOCK[target_platform()], length)


def split_blocks(x_BSHD: jax.Array, block: int) -> jax.Array:
    """[B, S, H, D] to [N, B, H, C, D], padded with zeros."""
    B, S, H, D = x_BSHD.shape
    N = -(-S // block)
    x_BSHD = jnp.pad(x_BSHD, ((0, 0), (0, N * block - S), (0, 0), (0, 0)))
    return x_BSHD.reshape(B, N, block, H, D).transpose(1, 0, 3, 2, 4)


def split_query_blocks(x_BSHD: jax.Array, block: int, groups: int) -> jax.Array:
    """[B, S, H, D] to [N, B, G, R, C, D]."""
    x_NBHCD = split_blocks(x_BSHD, block)
    N, B, H, C, D = x_NBHCD.shape
    return x_NBHCD.reshape(N, B, groups, H // groups, C, D)


def join_blocks(x_NBHCD: jax.Array, length: int) -> jax.Array:
    """The inverse of both; dimensions between B and C are merged into heads."""
    N, B, *heads, C, D = x_NBHCD.shape
    H = int(np.prod(heads))
    return x_NBHCD.reshape(N, B, H, C, D).transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, D)[:, :length]


def dot(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix product accumulated in fp32, or wider for wider operands."""
    return jnp.einsum(spec, left, right, preferred_element_type=accumulation_dtype(left))


def accumulation_dtype(x: jax.Array) -> jnp.dtype:
    """fp32, or wider for wider operands."""
    return jnp.promote_types(jnp.float32, x.dtype)
