"""The stack: patterns, packing, rematerialisation, residual forms, initial values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.config import HYBRID_PERIOD
from mmx.model.parameters import deepnorm_gain
from mmx.model.text import bind, init_params, layer_runs, parameter_specs
from tests.tiny import TINY, params, tiny, tokens


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, ids, segment_ids=None):
    model = bind(config, params)
    return model.logits(model(ids, segment_ids_BS=segment_ids)[0])


def test_pattern_is_split_into_periods_and_runs():
    periods, runs = layer_runs(HYBRID_PERIOD * 10)
    assert periods == 10
    assert [(run.kind, run.start, run.length) for run in runs] == [("lightning", 0, 7), ("softmax", 7, 1)]
    assert layer_runs(("softmax",) * 5)[0] == 5
    periods, runs = layer_runs(("softmax", "lightning", "lightning", "softmax"))
    assert (periods, [run.length for run in runs]) == (1, [1, 2, 1])


def test_scan_equals_layers_one_by_one():
    config = TINY
    model = bind(config, params())
    ids = jnp.asarray(tokens(2, 20))
    x = model._embed(ids)
    periods, runs = layer_runs(config.layer_pattern)
    from mmx.model.block import Tokens
    from mmx.model.rope import rope_table
    from pallas_kernels.lightning_attention import layer_slopes

    positions = jnp.broadcast_to(jnp.arange(20), ids.shape)
    context = Tokens(rope_table(positions, config.rotary_dim, config.rope_base), None, None, None)
    number = 0
    for period in range(periods):
        for run in runs:
            for place in range(run.length):
                block = jax.tree.map(lambda leaf: leaf[period, place], model.runs[run.name])  # noqa: B023
                slopes = jnp.asarray(layer_slopes(config.num_heads, number, config.num_layers))
                x, _, _ = block(x, slopes, context, dropless=True)
                number += 1
    assert number == config.num_layers
    want = model.logits(model.final_norm(x))
    np.testing.assert_allclose(logits(config, params(), ids), want, atol=2e-5)


@pytest.mark.parametrize("segment_ids", [[1] * 7 + [2] * 30 + [3] + [4] * 12, [0] * 20 + [5] * 30])
def test_packed_documents_do_not_see_each_other(segment_ids):
    ids = tokens(1, 50)
    segment_ids = np.asarray([segment_ids])
    packed = logits(TINY, params(), ids, segment_ids)
    for document in np.unique(segment_ids):
        place = np.flatnonzero(segment_ids[0] == document)
        alone = logits(TINY, params(), ids[:, place])
        np.testing.assert_allclose(packed[:, place], alone, atol=2e-5)


def test_causal():
    ids = tokens(1, 30)
    changed = ids.copy()
    changed[0, 20] += 1
    before, after = logits(TINY, params(), ids), logits(TINY, params(), changed)
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert np.abs(before[:, 20:] - after[:, 20:]).max() > 1e-3


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_remat_changes_nothing(remat):
    ids = jnp.asarray(tokens(2, 24))

    def gradient(config):
        def loss(params):
            model = bind(config, params)
            return jnp.mean(jax.nn.logsumexp(model.logits(model(ids)[0]), axis=-1))

        return jax.jit(jax.value_and_grad(loss))(params())

    (value, grads), (want_value, want_grads) = gradient(tiny(remat=remat)), gradient(TINY)
    np.testing.assert_allclose(value, want_value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_prenorm_keeps_the_raw_input():
    # With every branch switched off, a pre-norm stack is the identity up to the final norm, a post-norm stack is not.
    off = {"lightning_beta": 0.0, "softmax_beta": 0.0, "experts_beta": 0.0}
    config = tiny(postnorm=False, **off)
    ids = jnp.asarray(tokens(1, 5))
    model = bind(config, params())
    want = model.final_norm(model._embed(ids))
    np.testing.assert_allclose(model(ids)[0], want, atol=1e-6)
    scaled = bind(tiny(postnorm=False, softmax_alpha=3.0, **off), params())
    np.testing.assert_allclose(scaled(ids)[0], want, atol=1e-3)  # The final norm undoes a scale, up to its eps.
    # Under post-norm alpha multiplies the normalised input: the residual's size at the end is alpha itself.
    x = bind(tiny(**off), params())(ids)[0]
    assert np.isfinite(x).all()


def test_residual_scales_reach_each_branch():
    ids = tokens(1, 9)
    base = logits(TINY, params(), ids)
    for field in ("lightning_alpha", "softmax_alpha", "experts_alpha"):
        changed = logits(dataclasses.replace(TINY, **{field: 1.1}), params(), ids)
        assert np.abs(changed - base).max() > 1e-3, field


def test_bfloat16_runs_close_to_float32():
    ids = tokens(2, 40)
    narrow = logits(tiny(dtype="bfloat16"), params(), ids)
    assert narrow.dtype == jnp.float32
    wide = logits(TINY, params(), ids)
    agree = np.mean(np.argmax(narrow, -1) == np.argmax(wide, -1))
    assert agree > 0.8
    rounded = logits(tiny(dtype="bfloat16", logits_fp32=False), params(), ids)
    np.testing.assert_array_equal(rounded, np.asarray(rounded.astype(jnp.bfloat16), np.float32))


def test_initial_values():
    config = tiny(
        hidden_size=64, head_dim=32, num_layers=4, layer_pattern=("lightning", "lightning", "softmax", "softmax")
    )
    fresh = jax.jit(init_params, static_argnums=0)(config, jax.random.key(3))
    gain = deepnorm_gain(4)
    assert gain == pytest.approx(32**-0.25)
    D, width, F = 64, 4 * 32, config.expert_hidden_size
    lightning, softmax = fresh["runs"]["0_lightning"], fresh["runs"]["1_softmax"]
    expected = {
        "query": (lightning["attention"]["query"], 1, D + width),
        "key": (lightning["attention"]["key"], 1, D + width),
        "value": (lightning["attention"]["value"], gain, D + width),
        "gate": (lightning["attention"]["gate"], 1, D + width),
        "out": (lightning["attention"]["out"], gain, D + width),
        "softmax key": (softmax["attention"]["key"], 1, D + 2 * 32),
        "softmax value": (softmax["attention"]["value"], gain, D + 2 * 32),
        "experts up": (lightning["experts"]["gate_up"], gain, D + F),
        "experts down": (lightning["experts"]["down"], gain, D + F),
        "router": (softmax["experts"]["router"]["gate"], 1, D + 4),
        "embedding": (fresh["embedding"], 1, 61 + D),
    }
    for name, (array, scale, fans) in expected.items():
        assert np.std(array) == pytest.approx(scale * np.sqrt(2 / fans), rel=0.1), name
    assert all((leaf == 1).all() for leaf in (fresh["final_norm"]["scale"], lightning["attention_norm"]["scale"]))
    # No two layers start alike.
    query = lightning["attention"]["query"][0]
    assert np.abs(query[0] - query[1]).max() > 0


def test_router_stays_float32():
    fresh = jax.eval_shape(lambda key: init_params(tiny(param_dtype="bfloat16"), key), jax.random.key(0))
    kinds = {
        path[-2].key if path[-1].key == "gate" else "": leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)
    }
    assert kinds["router"] == jnp.float32
    assert fresh["embedding"].dtype == jnp.bfloat16


def test_parameter_specs_split_the_hidden_dimension():
    specs = parameter_specs(TINY)
    at_rest = ("fsdp", "expert", "expert_tensor", "context")
    assert specs["embedding"] == jax.P(("tensor",), at_rest)
    assert specs["runs"]["0_lightning"]["attention"]["query"] == jax.P(None, None, at_rest, ("tensor",), None)
    assert specs["runs"]["0_lightning"]["experts"]["down"] == jax.P(
        None, None, ("expert",), ("expert_tensor",), ("fsdp", "context", "tensor")
    )
