"""Every form of the grouped matrix product against the dense reference, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.blocked import Blocks, grouped_matmul_blocked
from pallas_kernels.grouped_matmul.op import _choose
from pallas_kernels.platform import compile_for

SIZES = {
    "uneven, one empty": ([5, 0, 7, 1], 13),
    "all in the last": ([0, 0, 0, 13], 13),
    "all in the first": ([13, 0, 0, 0], 13),
    "none": ([0, 0, 0, 0], 13),
    "rows left over": ([3, 2, 1, 4], 20),
    "several blocks": ([200, 30, 150, 20], 400),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("implementation", ["blocked", "padded", "ragged", Blocks(4, 4), Blocks(8, 2)])
@pytest.mark.parametrize("case", SIZES)
def test_equals_reference(case, implementation):
    sizes, M = SIZES[case]
    rng = np.random.default_rng(0)
    x, w, c = rng.normal(size=(M, 6)), rng.normal(size=(4, 6, 5)), rng.normal(size=(M, 5))
    sizes = jnp.asarray(sizes, jnp.int32)

    def value_and_gradients(implementation):
        def loss(x, w):
            if isinstance(implementation, Blocks):
                y = grouped_matmul_blocked(x, w, sizes, implementation)
            else:
                y = grouped_matmul(x, w, sizes, implementation=implementation)
            return jnp.sum(y * c), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, w)

    got, want = value_and_gradients(implementation), value_and_gradients("reference")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_rows_after_the_groups_do_not_leak():
    # NaN in rows that belong to no group reaches neither the result nor the weights' gradient.
    x = jnp.ones((12, 3)).at[8:].set(jnp.nan)
    w, sizes = jnp.ones((2, 3, 4)), jnp.asarray([5, 3], jnp.int32)
    loss = lambda w: jnp.sum(grouped_matmul_blocked(x, w, sizes, Blocks(4, 2)))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(w)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("platform", "rows", "width", "expected"),
    [
        ("cpu", 16384, 2048, "blocked"),
        ("tpu", 16384, 2048, "ragged"),
        ("gpu", 16384, 2048, "padded"),
        ("gpu", 4, 2048, "padded"),
        ("gpu", 16384, 65536, "blocked"),  # The copies of the matrices would take 6 GiB.
    ],
)
def test_automatic_choice(platform, rows, width, expected):
    w_EDF = jax.ShapeDtypeStruct((8, 2048, width), jnp.bfloat16)
    with compile_for(platform):
        assert _choose(rows, w_EDF) == expected


def test_mistakes_are_named():
    x, w = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5))
    with pytest.raises(ValueError, match="do not fit"):
        grouped_matmul(x, w, jnp.asarray([1, 1, 1], jnp.int32))
    with pytest.raises(ValueError, match="do not fit"):
        grouped_matmul(x.astype(jnp.bfloat16), w, jnp.asarray([1, 1], jnp.int32))
    with pytest.raises(ValueError, match="not one of"):
        grouped_matmul(x, w, jnp.asarray([1, 1], jnp.int32), implementation="sparse")
