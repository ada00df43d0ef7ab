"""Prefill and decoding on a mesh give the logits of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.config import MeshConfig
from mmx.generate.engine import prefill_and_step
from mmx.model.text import parameter_specs
from mmx.parallel import build_mesh
from tests.tiny import params, tiny, tokens

CONFIG = tiny(vocab_size=64)
ROWS, PROMPT, SLOTS = 4, 12, 16


def logits(weights) -> list[np.ndarray]:
    """After the prompt, and after two more tokens."""
    prefill, step = prefill_and_step(CONFIG)
    padding = jnp.array([0, 3, 0, 5], jnp.int32)
    more = tokens(2, ROWS, seed=1)
    out, cache = prefill(weights, jnp.asarray(tokens(ROWS, PROMPT)), padding, SLOTS)
    found = [np.asarray(out)]
    for n in range(2):
        out, cache = step(weights, jnp.asarray(more[n]), cache, jnp.int32(PROMPT + n), padding)
        found.append(np.asarray(out))
    return found


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, expert=2), MeshConfig(expert=2, tensor=2)])
def test_same_logits_as_one_device(mesh):
    want = logits(params(CONFIG))
    devices = build_mesh(mesh, jax.devices()[:4])
    with jax.set_mesh(devices):
        placed = jax.tree.map(
            lambda x, spec: jax.device_put(np.asarray(x), jax.NamedSharding(devices, spec)),
            params(CONFIG),
            parameter_specs(CONFIG),
        )
        found = logits(placed)
    for one, other in zip(want, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5)
