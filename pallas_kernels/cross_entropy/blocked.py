"""Cross-entropy over blocks of tokens, in plain JAX: logits of one block exist at a time, and only once.

The result is one scalar, so its gradient can be formed together with it and only scaled later. The forward pass under
differentiation therefore leaves the gradients of x and of the head behind, and no logits are computed a second time.

Shapes: T tokens, C tokens in a block, D hidden channels, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_blocked(
    x_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    logits_dtype: jnp.dtype,
    block: int,
) -> jax.Array:
    """Weighted negative log-likelihood; ``op.py`` states the contract. ``block`` is C."""

    def step(total, inputs):
        x_CD, targets_C, weights_C = inputs
        logits_CV = _logits(x_CD, head_VD, logits_dtype)
        return total + jnp.sum(weights_C * _nll(logits_CV, targets_C)[0]), None

    inputs = _cut(x_TD, targets_T, weights_T, block)
    return lax.scan(step, jnp.zeros((), _wide(x_TD.dtype)), inputs)[0]


def _forward(x_TD, head_VD, targets_T, weights_T, logits_dtype, block):
    def step(carry, inputs):
        total, dhead_VD = carry
        x_CD, targets_C, weights_C = inputs
        logits_CV = _logits(x_CD, head_VD, logits_dtype)
        nll_C, lse_C = _nll(logits_CV, targets_C)
        probabilities_CV = jnp.exp(logits_CV - lse_C[:, None])
        hit_CV = lax.broadcasted_iota(targets_C.dtype, logits_CV.shape, 1) == targets_C[:, None]
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


def _backward(logits_dtype, block, residuals, dtotal):
    dx_TD, dhead_VD, nll_T = residuals
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


def _nll(logits_CV, targets_C):
    """Negative log-likelihoods and log-sum-exps, [C] each."""
    lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
    return lse_C - jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0], lse_C


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(jnp.float32, dtype)
