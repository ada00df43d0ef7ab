"""The exchange's bodies against each other and against a capacity's rules; drop rates of local and global routing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.config import MeshConfig
from mmx.model.experts import Experts
from mmx.parallel import build_mesh, spec
from mmx.parallel.exchange import choose_body
from pallas_kernels.platform import compile_for
from tests.tiny import tiny

ROWS, LENGTH = 4, 16


def on_mesh(sizes: dict[str, int], config, x):
    """Output, drop rate and gradients of a layer of experts on a mesh."""
    mesh = build_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
    with jax.set_mesh(mesh):
        experts = Experts(config, jax.random.key(0))
        x = jax.device_put(x, spec("batch", "sequence", None))

        @jax.jit
        def run(experts, x):
            def loss(experts, x):
                y, stats = experts(x, None, dropless=False)
                return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), (y, stats.dropped)

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(experts, x)

        (_, (y, dropped)), grads = run(experts, x)
        return jax.device_get((y, dropped, jax.tree.leaves(grads)))


def skewed(config) -> np.ndarray:
    """Tokens of which those of the first rows all like the same experts: devices' loads differ widely."""
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, config.hidden_size)).astype(np.float32)
    direction = np.asarray(Experts(config, jax.random.key(0)).router.gate[...])[:, 0]
    x[: ROWS // 2] += 3 * direction / np.linalg.norm(direction)
    x[ROWS // 2 :] -= 3 * direction / np.linalg.norm(direction)
    return x


@pytest.mark.parametrize("sizes", [{"expert": 2, "expert_tensor": 2}, {"expert": 4}], ids=str)
@pytest.mark.parametrize("capacity_factor", [0.0, 0.75])
def test_bodies_agree(sizes, capacity_factor):
    config = tiny(capacity_factor=capacity_factor)
    x = skewed(config)
    want = on_mesh(sizes, tiny(capacity_factor=capacity_factor, expert_exchange="gather"), x)
    assert (want[1] > 0) == (capacity_factor > 0)
    for body in ("padded", "ragged"):
        got = on_mesh(sizes, tiny(capacity_factor=capacity_factor, expert_exchange=body), x)
        assert got[1] == pytest.approx(want[1])
        np.testing.assert_allclose(got[0], want[0], atol=2e-6)
        for a, b in zip(got[2], want[2], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_global_router_drops_less_than_local_routing():
    # Half of the devices have too many tokens for expert 0 and the others hardly any.
    local, shared = (tiny(capacity_factor=1.0, global_router=is_global) for is_global in (False, True))
    x = skewed(local)
    rates = {}
    for name, config in {"local": local, "global": shared}.items():
        rates[name] = on_mesh({"fsdp": 2, "expert": 2}, config, x)[1]
    assert rates["global"] < 0.7 * rates["local"]


def test_global_router_drops_the_same_assignments_on_any_mesh():
    config = tiny(capacity_factor=0.75, global_router=True, sequence_layout="contiguous")
    x = skewed(config)
    alone, stats = Experts(config, jax.random.key(0))(x, None, dropless=False)
    assert stats.dropped > 0.1
    for sizes in ({"fsdp": 2, "expert": 2}, {"expert": 2, "context": 2, "tensor": 2}, {"context": 4}):
        y, dropped, _ = on_mesh(sizes, config, x)
        assert dropped == pytest.approx(float(stats.dropped))
        np.testing.assert_allclose(y, alone, atol=2e-6)  # A token without its expert would be far off.


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_change_nothing(groups):
    x = skewed(tiny())
    sizes = {"expert": 2, "context": 2}
    want = on_mesh(sizes, tiny(expert_exchange="padded"), x)
    got = on_mesh(sizes, tiny(expert_exchange="padded", exchange_groups=groups), x)
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    for a, b in zip(got[2], want[2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "has_capacity", "global_router", "body"),
    [
        ("tpu", True, False, "padded"),
        ("tpu", True, True, "ragged"),
        ("tpu", False, False, "ragged"),
        # XLA's ragged all-to-all is slow on GPUs and missing on CPUs.
        ("gpu", False, False, "gather"),
        ("gpu", True, False, "padded"),
        ("cpu", False, False, "gather"),
    ],
)
def test_the_automatic_body(platform, has_capacity, global_router, body):
    with jax.set_mesh(build_mesh(MeshConfig(expert=2), jax.devices()[:2])), compile_for(platform):

        @jax.shard_map(in_specs=(), out_specs=jax.P())
        def choose():
            assert choose_body("auto", has_capacity, global_router) == body
            assert choose_body("padded", has_capacity, global_router) == "padded"
            return jnp.zeros(())

        jax.eval_shape(choose)
