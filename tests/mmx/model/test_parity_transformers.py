"""Logits, loss and every gradient of the text model against Transformers' class, in fp32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.model.text import bind
from mmx.train.loss import Batch, loss_sums
from tests.tiny import params, tiny, tokens

torch = pytest.importorskip("torch", reason="PyTorch is not installed: bash tests/run.sh installs a CPU build")
pytest.importorskip("transformers", reason="Transformers is not installed")

from tests.mmx.model.transformers_oracle import oracle, to_mmx  # noqa: E402

# What is compared with the class as it is has all its channels rotated and its slopes.
AS_IT_IS = {"rotary_dim": 8, "slope_rule": "transformers"}
SCALES = {
    f"{branch}_{scale}": value
    for (branch, scale), value in zip(
        [(b, s) for b in ("lightning", "softmax", "experts") for s in ("alpha", "beta")],
        (1.3, 0.7, 0.9, 1.4, 1.7, 0.6),
        strict=True,
    )
}
CONFIGS = {
    "class as it is, six heads": tiny(**AS_IT_IS, num_heads=6, num_kv_heads=3),
    "class as it is, three heads": tiny(**AS_IT_IS, num_heads=3, num_kv_heads=3),
    "released slopes of six heads, alphas and betas": tiny(num_heads=6, num_kv_heads=3, **SCALES),
    "released slopes of three heads": tiny(num_heads=3, num_kv_heads=1),
    "Transformers' slopes, partial RoPE": tiny(slope_rule="transformers", num_heads=6, num_kv_heads=6, rotary_dim=6),
    "eight heads to a key-value head": tiny(num_heads=8, num_kv_heads=1),
    "irregular pattern": tiny(num_layers=4, layer_pattern=("softmax", "lightning", "lightning", "softmax")),
    "all lightning": tiny(num_layers=3, layer_pattern=("lightning",) * 3),
    "all softmax": tiny(num_layers=2, layer_pattern=("softmax",) * 2),
    "tied, three of five experts": tiny(tie_embeddings=True, num_experts=5, experts_per_token=3),
    "head wider than hidden": tiny(head_dim=16, rotary_dim=8, norm_eps=1e-3),
}
# 75 is a multiple of neither side's block.
LENGTH = 75
# Each costs compiling a backward pass.
WITH_GRADIENTS = (
    "class as it is, six heads",
    "released slopes of six heads, alphas and betas",
    "tied, three of five experts",
)


def numpy_tensors(named) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in named}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits(name):
    config = CONFIGS[name]
    ids = tokens(2, LENGTH, vocab_size=config.vocab_size)
    with oracle(config, correct=not name.startswith("class as it is")) as model, torch.no_grad():
        want = model(torch.tensor(ids).long(), use_cache=False).logits.numpy()
        params = to_mmx(config, numpy_tensors(model.state_dict().items()))

    @jax.jit
    def logits(params, ids):
        model = bind(config, params)
        return model.logits(model(ids)[0])

    got = logits(params, ids)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=3e-5)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_loss_and_gradients(name):
    config = dataclasses.replace(CONFIGS[name], aux_loss_form="released", aux_loss_coefficient=0.3)
    ids = tokens(2, 41)
    with oracle(config, correct=not name.startswith("class as it is")) as model:
        batch = torch.tensor(ids).long()
        outputs = model(batch, labels=batch, use_cache=False, output_router_logits=True)
        # The class adds its own coefficient; the parts are put together here.
        cross_entropy = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss = cross_entropy + config.aux_loss_coefficient * outputs.aux_loss
        loss.backward()
        params = to_mmx(config, numpy_tensors(model.state_dict().items()))
        named = [(name, parameter.grad) for name, parameter in model.named_parameters()]
        want = to_mmx(config, numpy_tensors(named))

    ids = jnp.asarray(ids)
    # The class takes no loss at the last position, yet routes it: targets shift, the load counts every token.
    ours = Batch(
        tokens_BS=ids,
        targets_BS=jnp.roll(ids, -1, axis=1),
        segment_ids_BS=jnp.ones_like(ids),
        positions_BS=jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
        weights_BS=jnp.ones(ids.shape).at[:, -1].set(0),
    )
    objective = functools.partial(loss_sums, config, batch=ours, dropless=True)
    (total, sums), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    np.testing.assert_allclose(sums.nll / sums.tokens, cross_entropy.item(), rtol=1e-5)
    np.testing.assert_allclose(total / sums.tokens, loss.item(), rtol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(want)
    grads = dict(jax.tree_util.tree_leaves_with_path(grads))
    for path, expected in jax.tree_util.tree_leaves_with_path(want):
        # Layer by layer: a small gradient must not hide behind a large one.
        layers = expected.shape[0] * expected.shape[1] if path[0].key == "runs" else 1
        got, expected = (np.asarray(x).reshape(layers, -1) for x in (grads[path] / sums.tokens, expected))
        error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() < 1e-3, path


def test_the_two_rules_of_slopes_are_two_models():
    released, transformers = (
        tiny(num_heads=6, num_kv_heads=3, slope_rule=rule) for rule in ("released", "transformers")
    )
    ids = tokens(1, LENGTH)
    forward = jax.jit(lambda params, config: bind(config, params)(ids)[0], static_argnums=1)
    difference = forward(params(released), released) - forward(params(released), transformers)
    assert np.abs(difference).max() > 0.1
