"""Gated activations. Shapes: ... leading dimensions, F channels."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up, for gate and up side by side [..., 2F]. Keeps nothing but its input for the backward pass."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _forward(gate_up):
    return swiglu(gate_up), gate_up


def _backward(gate_up, dy):
    gate, up = jnp.split(gate_up, 2, axis=-1)
    sigmoid = lax.logistic(gate)
    silu = gate * sigmoid
    dgate = dy * up * (sigmoid + silu * (1 - sigmoid))
    return (jnp.concatenate([dgate, dy * silu], axis=-1),)


swiglu.defvjp(_forward, _backward)
