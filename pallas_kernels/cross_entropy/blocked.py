"""Cross-entropy over blocks of tokens, in plain JAX: logits of one block exist at a time, and only once.

The result is one scalar, so its gradient can be formed together with it and only scaled later. The forward pass under
differentiation therefore leaves the gradients of x and of the head behind, and no logits are computed a second time.

Shapes: T tokens, C tokens in a block, D hidden channels, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy_blocked(
    x_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    logits_dtype: jnp.dtype,
    block: int,
    vocab_axis: str | None = None,
) -> jax.Array:
    """Weighted negative log-likelihood; ``op.py`` states the contract. ``block`` is C."""

    def step(total, inputs):
        x_CD, targets_C, weights_C = inputs
        logits_CV = _logits(x_CD, head_VD, logits_dtype)
        return total + jnp.sum(weights_C * _nll(logits_CV, targets_C, vocab_axis)[0]), None

    inputs = _cut(x_TD, targets_T, weights_T, block)
    return lax.scan(step, jnp.zeros((), _wide(x_TD.dtype)), inputs)[0]


def _forward(x_TD, head_VD, targets_T, weights_T, logits_dtype, block, vocab_axis):
    def step(carry, inputs):
        total, dhead_VD = carry
        x_CD, targets_C, weights_C = inputs
        logits_CV = _logits(x_CD, head_VD, logits_dtype)
        nll_C, lse_C, hit_CV = _nll(logits_CV, targets_C, vocab_axis)
        probabilities_CV = jnp.exp(logits_CV - lse_C[:, None])
        dlogits_CV = (weights_C[:, None] * (probabilities_CV - hit_CV)).astype(x_TD.dtype)
        dx_CD = jnp.einsum("cv,vd->cd", dlogits_CV, head_VD, preferred_element_type=total.dtype)
        dhead_VD += jnp.einsum("cv,cd->vd", dlogits_CV, x_CD, preferred_element_type=total.dtype)
        return (total + jnp.sum(weights_C * nll_C), dhead_VD), (dx_CD.astype(x_TD.dtype), nll_C)

    wide = _wide(x_TD.dtype)
    carry = (jnp.zeros((), wide), jnp.zeros(head_VD.shape, wide))
    (total, dhead_VD), (dx_NCD, nll_NC) = lax.scan(step, carry, _cut(x_TD, targets_T, weights_T, block))
    dx_TD = dx_NCD.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]]
    nll_T = nll_NC.reshape(-1)[: x_TD.shape[0]]
    return total, (dx_TD, dhead_VD.astype(head_VD.dtype), nll_T.astype(weights_T.dtype))


def _backward(logits_dtype, block, vocab_axis, residuals, dtotal):
    dx_TD, dhead_VD, nll_T = residuals
    if vocab_axis is not None:
        # The result is the same on every device of the axis, and each has a share of its cotangent.
        dtotal = lax.psum(dtotal, vocab_axis)
        nll_T = nll_T / lax.axis_size(vocab_axis)
    dx_TD, dhead_VD, dweights_T = ((dtotal * g).astype(g.dtype) for g in (dx_TD, dhead_VD, nll_T))
    return dx_TD, dhead_VD, None, dweights_T


cross_entropy_blocked.defvjp(_forward, _backward)


def _cut(x_TD, targets_T, weights_T, block):
    """Operands in blocks of C tokens; the padding has weight 0."""
    padding = -x_TD.shape[0] % block
    return tuple(
        jnp.pad(a, ((0, padding), *[(0, 0)] * (a.ndim - 1))).reshape(-1, block, *a.shape[1:])
        for a in (x_TD, targets_T, weights_T)
    )


def _logits(x_CD, head_VD, logits_dtype):
    wide = _wide(x_CD.dtype)
    logits_CV = jnp.einsum("cd,vd->cv", x_CD, head_VD, preferred_element_type=wide)
    return logits_CV.astype(logits_dtype).astype(wide)


def _nll(logits_CV, targets_C, vocab_axis):
    """Negative log-likelihoods [C], log-sum-exps [C], and which logit is the target's [C, V]."""
    vocabulary = lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1)
    if vocab_axis is None:
        hit_CV = vocabulary == targets_C[:, None]
        lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
        return lse_C - jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0], lse_C, hit_CV
    hit_CV = vocabulary + lax.axis_index(vocab_axis) * logits_CV.shape[1] == targets_C[:, None]
    max_C = lax.pmax(jnp.max(logits_CV, axis=-1), vocab_axis)
    exp_sum_C, target_C = lax.psum(
        (jnp.sum(jnp.exp(logits_CV - max_C[:, None]), axis=-1), jnp.sum(jnp.where(hit_CV, logits_CV, 0), axis=-1)),
        vocab_axis,
    )
    lse_C = max_C + jnp.log(exp_sum_C)
    return lse_C - target_C, lse_C, hit_CV


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, dtype)
