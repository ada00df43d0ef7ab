"""Activations. Their backward passes keep nothing but their inputs: recomputing is cheaper than memory traffic.

Shapes: ... leading dimensions, F channels.
"""

import functools

import jax
import jax.numpy as jnp

# Inside a scan over layers nothing outside the layer could be merged with the recomputation.
_keep_inputs = functools.partial(jax.checkpoint, prevent_cse=False)


@_keep_inputs
def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x)."""
    return jax.nn.silu(x)


@_keep_inputs
def sigmoid_gate(x: jax.Array, gate: jax.Array) -> jax.Array:
    """x * sigmoid(gate)."""
    return x * jax.nn.sigmoid(gate)


@_keep_inputs
def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up, for gate and up side by side [..., 2F]."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up
