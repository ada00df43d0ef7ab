"""Router, dispatch and experts against dense references; which assignments a capacity drops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.model.activation import swiglu
from mmx.model.experts import Experts
from mmx.model.router import Router, RouterLoad, auxiliary_loss
from mmx.parallel.dispatch import plan_dispatch, rows_from_tokens, tokens_from_rows
from tests.tiny import TINY, tiny


def dense_experts(experts: Experts, x, kept=None):
    """Every expert on every token, then the router's choice: slow and obvious."""
    routing, _ = experts.router(x, None)
    weights = routing.weights_J if kept is None else routing.weights_J * kept
    gate, up = experts.gate_up[...][:, :, 0], experts.gate_up[...][:, :, 1]
    hidden = jax.nn.silu(jnp.einsum("bsd,edf->bsef", x, gate)) * jnp.einsum("bsd,edf->bsef", x, up)
    y = jnp.einsum("bsef,efd->bsed", hidden, experts.down[...])
    chosen = jax.nn.one_hot(routing.experts_J, y.shape[2])
    return jnp.einsum("bsed,bsje,bsj->bsd", y, chosen, weights)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("capacity_factor", [0.0, 0.5, 1.0])
def test_experts_equal_dense(capacity_factor):
    config = tiny(capacity_factor=capacity_factor)
    experts = Experts(config, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 13, config.hidden_size))
    cotangent = jax.random.normal(jax.random.key(2), x.shape)
    routing, _ = experts.router(x, None)
    capacity = int(np.ceil(capacity_factor * 26 * 2 / 4)) if capacity_factor else None
    kept = plan_dispatch(routing.experts_J.reshape(26, 2), 4, capacity).kept_TJ.reshape(2, 13, 2)
    assert bool(kept.all()) == (capacity_factor == 0.0)

    def value_and_gradients(function):
        loss = lambda experts, x: jnp.sum(function(experts, x) * cotangent)  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(experts, x)

    got = value_and_gradients(lambda experts, x: experts(x, None, dropless=False)[0])
    want = value_and_gradients(lambda experts, x: dense_experts(experts, x, kept))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    _, stats = experts(x, None, dropless=False)
    assert stats.dropped == pytest.approx(1 - kept.mean())
    _, stats = experts(x, None, dropless=True)
    assert stats.dropped == 0


def test_capacity_fills_by_choice_then_position():
    # Three tokens want expert 0 first, one wants it second; it has room for two rows.
    experts = jnp.asarray([[1, 0], [0, 2], [0, 1], [0, 2]])
    dispatch = plan_dispatch(experts, 3, capacity=2)
    np.testing.assert_array_equal(dispatch.kept_TJ, [[True, False], [True, True], [True, True], [False, True]])
    np.testing.assert_array_equal(dispatch.group_sizes_E, [2, 2, 2])
    # Rows of expert 0 are tokens 1 and 2; of expert 1 tokens 0 (first choice) and 2 (second); of expert 2 1 and 3.
    np.testing.assert_array_equal(dispatch.token_M[:6], [1, 2, 0, 2, 1, 3])
    M = experts.size
    np.testing.assert_array_equal(dispatch.row_TJ, [[2, M], [0, 4], [1, 3], [M, 5]])


@pytest.mark.usefixtures("float64")
def test_dispatch_gradients_are_those_of_plain_indexing():
    rng = np.random.default_rng(0)
    T, J, E, D = 11, 2, 3, 4
    experts = jnp.asarray(np.stack([rng.permutation(E)[:J] for _ in range(T)]))
    x, weights, c = (jnp.asarray(rng.normal(size=shape)) for shape in ((T, D), (T, J), (T, D)))
    for capacity in (None, 4):
        dispatch = plan_dispatch(experts, E, capacity)
        scale = jnp.asarray(rng.normal(size=(T * J, 1)))

        def ours(x, weights, dispatch=dispatch, scale=scale):
            rows = rows_from_tokens(x, dispatch) ** 2 * scale
            return jnp.sum(tokens_from_rows(rows, weights, dispatch) * c)

        def plain(x, weights, dispatch=dispatch, scale=scale):
            rows = jnp.concatenate([x[dispatch.token_M] ** 2 * scale, jnp.zeros((1, D))])
            return jnp.sum(jnp.einsum("tjd,tj->td", rows[dispatch.row_TJ], weights) * c)

        got, want = (jax.value_and_grad(f, argnums=(0, 1))(x, weights) for f in (ours, plain))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_router_is_the_renormalised_softmax():
    router = Router(tiny(experts_per_token=3), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, TINY.hidden_size))
    routing, load = router(x, None)
    logits = np.asarray(x @ router.gate[...])
    order = np.argsort(-logits, axis=-1)[:, :3]
    np.testing.assert_array_equal(routing.experts_J, order)
    top = np.take_along_axis(logits, order, axis=-1)
    # Renormalising the softmax over all experts is the softmax over the chosen ones (report Eq. 1).
    want = np.exp(top - top.max(-1, keepdims=True))
    np.testing.assert_allclose(routing.weights_J, want / want.sum(-1, keepdims=True), rtol=1e-5)
    assert load.share_E.sum() == pytest.approx(3)
    assert load.probability_E.sum() == pytest.approx(1)


def test_router_load_leaves_padding_out():
    router = Router(TINY, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, TINY.hidden_size))
    valid = jnp.asarray([[True] * 6, [True] * 2 + [False] * 4])
    _, load = router(x, valid)
    _, want = router(jnp.concatenate([x[0], x[1, :2]]), None)
    np.testing.assert_allclose(load.share_E, want.share_E, rtol=1e-6)
    np.testing.assert_allclose(load.probability_E, want.probability_E, rtol=1e-6)


def test_auxiliary_loss_forms():
    rng = np.random.default_rng(0)
    E, J = 8, 2
    share = rng.dirichlet(np.ones(E), 1) * J
    load = RouterLoad(jnp.asarray(share), jnp.asarray(rng.dirichlet(np.ones(E), 1)))
    assert auxiliary_loss(load, "paper") == pytest.approx(float((share * load.probability_E).sum() / E))
    # For one layer the two differ by exactly E^2; balanced, the released form is J.
    assert auxiliary_loss(load, "released") == pytest.approx(E**2 * float(auxiliary_loss(load, "paper")))
    even = RouterLoad(jnp.full((3, E), J / E), jnp.full((3, E), 1 / E))
    assert auxiliary_loss(even, "released") == pytest.approx(J)
    assert auxiliary_loss(even, "paper") == pytest.approx(3 * J / E**2)
    with pytest.raises(ValueError, match="unknown form"):
        auxiliary_loss(even, "z")


def test_auxiliary_loss_evens_out_the_load():
    router = Router(TINY, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (256, TINY.hidden_size)) + 1.0

    @jax.jit
    def descend(router):
        grads = jax.grad(
            lambda router: auxiliary_loss(jax.tree.map(lambda a: a[None], router(x, None)[1]), "released")
        )(router)
        return jax.tree.map(lambda p, g: p - 0.05 * g, router, grads)

    before = router(x, None)[1].share_E.max()
    for _ in range(200):
        router = descend(router)
    assert router(x, None)[1].share_E.max() < before


@pytest.mark.usefixtures("float64")
def test_swiglu_gradient():
    x = jax.random.normal(jax.random.key(0), (5, 12))
    plain = lambda x: jnp.sum(jnp.sin(jax.nn.silu(x[:, :6]) * x[:, 6:]))  # noqa: E731
    ours = lambda x: jnp.sum(jnp.sin(swiglu(x)))  # noqa: E731
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), atol=1e-12)


def test_deterministic():
    experts = Experts(tiny(capacity_factor=1.0), jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 64, TINY.hidden_size))
    run = jax.jit(functools.partial(experts, valid=None, dropless=False))
    np.testing.assert_array_equal(run(x)[0], run(x)[0])
