"""Every form of the grouped matrix product against the dense reference, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.aot import CHIPS, compile_for_chip, missing_compiler
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.blocked import Blocks, grouped_matmul_blocked
from pallas_kernels.grouped_matmul.op import _choose
from pallas_kernels.grouped_matmul.tpu import Tiles, grouped_matmul_tpu
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
        ("tpu", 16384, 2048, "tpu"),
        ("gpu", 16384, 2048, "padded"),
        ("gpu", 4, 2048, "padded"),
        ("gpu", 16384, 65536, "blocked"),  # The copies of the matrices would take 6 GiB.
    ],
)
def test_automatic_choice(platform, rows, width, expected):
    x_MD, w_EDF = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 2048), (8, 2048, width)))
    with compile_for(platform):
        assert _choose(x_MD, w_EDF) == expected


def test_tpu_falls_back_with_a_reason(caplog):
    x_MD, w_EDF = jnp.zeros((4, 3), jnp.float16), jnp.zeros((2, 3, 5), jnp.float16)
    with compile_for("tpu"):
        assert _choose(x_MD, w_EDF) == "ragged"
    assert "bfloat16 and float32" in caplog.text
    with pytest.raises(NotImplementedError, match="traced for cpu; 'tpu_interpret'"):
        grouped_matmul(*(a.astype(jnp.float32) for a in (x_MD, w_EDF)), jnp.zeros(2, jnp.int32), implementation="tpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tpu_kernels_equal_reference(dtype):
    # One program for all sizes: groups that share tiles, that fill several, none at all; rows left over are NaN.
    M, D, F = 300, 200, 130
    rng = np.random.default_rng(1)
    x, w, dy = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((M, D), (4, D, F), (M, F)))

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(implementation, x, w, dy, sizes):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return y, pullback(dy)

    for sizes in ([5, 0, 150, 1], [0, 0, 0, 0], [0, 300, 0, 0], [128, 128, 40, 4]):
        inside = jnp.arange(M)[:, None] < sum(sizes)
        sizes = jnp.asarray(sizes, jnp.int32)
        got = value_and_gradients("tpu_interpret", jnp.where(inside, x, jnp.nan), w, dy, sizes)
        wide = (jnp.where(inside, a, 0).astype(jnp.float32) for a in (x, dy))
        x_wide, dy_wide = wide
        want = value_and_gradients("reference", x_wide, w.astype(jnp.float32), dy_wide, sizes)
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.dtype == dtype
            assert np.abs(a.astype(jnp.float32) - b).max() <= tolerance * np.abs(b).max()


def test_wide_tiles_of_output_channels():
    assert Tiles(512, 1024).of_product(6144, 9216) == (512, 1024, 1536)
    assert Tiles(512, 1024).of_product(9216, 6144) == (512, 1024, 1536)
    assert Tiles(512, 1024).of_gradient(6144, 9216) == (512, 1024, 1024)
    assert Tiles(128, 1024).of_product(200, 130) == (128, 256, 256)
    # Two tiles of 384 channels of output, forward and in the gradient of the rows.
    rng = np.random.default_rng(2)
    x, w, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((150, 768), (2, 768, 768), (150, 768)))
    sizes = jnp.asarray([50, 100], jnp.int32)
    run = functools.partial(grouped_matmul_tpu, group_sizes_E=sizes, tiles=Tiles(128, 256), interpret=True)
    got, pullback = jax.vjp(lambda x, w: run(x, w), x, w)
    want, reference = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="reference"), x, w)
    for a, b in zip((got, *pullback(dy)), (want, *reference(dy)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("chip", ["v5p", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5e", "v6e"))])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_tpu_kernels_compile_without_copies(chip, dtype):
    # The released model's experts, two of 8,192 tokens' rows each; fewer where the chip's memory is small.
    M, E, D, F = 16384, 32 if chip == "v5p" and dtype == "bfloat16" else 4, 6144, 9216

    def gradients(x, w, sizes, dy):
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
        return y, pullback(dy)

    x, w, dy = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((M, D), (E, D, F), (M, F)))
    compiled = compile_for_chip(CHIPS[chip], gradients, x, w, jax.ShapeDtypeStruct((E,), jnp.int32), dy)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    # No more than the results before rows beyond the groups are cleared.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * M * F * jnp.dtype(dtype).itemsize


def test_mistakes_are_named():
    x, w = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5))
    with pytest.raises(ValueError, match="do not fit"):
        grouped_matmul(x, w, jnp.asarray([1, 1, 1], jnp.int32))
    with pytest.raises(ValueError, match="do not fit"):
        grouped_matmul(x.astype(jnp.bfloat16), w, jnp.asarray([1, 1], jnp.int32))
    with pytest.raises(ValueError, match="not one of"):
        grouped_matmul(x, w, jnp.asarray([1, 1], jnp.int32), implementation="sparse")
