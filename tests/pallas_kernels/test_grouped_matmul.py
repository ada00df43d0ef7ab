"""Every form of the grouped matrix product against the dense reference, values and gradients."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tune
from pallas_kernels.aot import CHIPS, ProfileError, compile_for_chip, missing_compiler
from pallas_kernels.grouped_matmul import grouped_matmul, tpu_figures, tpu_search, tpu_tiles
from pallas_kernels.grouped_matmul.blocked import Blocks, grouped_matmul_blocked
from pallas_kernels.grouped_matmul.op import _choose
from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu
from pallas_kernels.grouped_matmul.tpu_tiles import Tile, Tiles, choose_tiles
from pallas_kernels.platform import compile_for
from pallas_kernels.size_table import read_rows

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


def test_tiles_fit_their_operands():
    wide = Tile(512, 1024, 1536)
    assert wide.within(6144, 9216) == wide
    # 1,536 channels do not divide 8,192, and what is left over of 1,024 is masked.
    assert wide.within(9216, 8192) == (512, 1024, 1024)
    assert wide.within(200, 130) == (512, 256, 256)
    # Two tiles of 384 channels of output, forward and in the gradient of the rows.
    rng = np.random.default_rng(2)
    x, w, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((150, 768), (2, 768, 768), (150, 768)))
    sizes, tiles = jnp.asarray([50, 100], jnp.int32), Tiles(Tile(128, 256, 384), Tile(256, 256, 128))
    run = functools.partial(grouped_matmul_tpu, group_sizes_E=sizes, tiles=tiles, interpret=True)
    got, pullback = jax.vjp(lambda x, w: run(x, w), x, w)
    want, reference = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="reference"), x, w)
    for a, b in zip((got, *pullback(dy)), (want, *reference(dy)), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_tall_tiles_for_large_groups(tmp_path, monkeypatch):
    row = {"device": "TPU v5", "dtype": "bfloat16"} | {
        kernel: [[128, 1024, 1024, 0.7], [512, 1024, 1024, 0.9]] for kernel in ("gmm", "tgmm")
    }
    table = tmp_path / "tiles.json"
    table.write_text(json.dumps({"rows": [row]}))
    monkeypatch.setattr(tpu_tiles, "TABLE", table)
    tpu_tiles._table.cache_clear()
    chosen = lambda rows, groups: choose_tiles(rows, groups, "bfloat16", "TPU v5p").product.rows  # noqa: E731
    share = lambda rows, groups: tpu_tiles.share_of_peak("TPU v5", "tgmm", rows, groups)  # noqa: E731
    # 32 groups of 512 rows: all but one begin inside of a tile.
    assert (chosen(2**14, 32), chosen(2**14, 1), chosen(2**20, 32)) == (128, 512, 512)
    # Fewer rows than a tile has are padding.
    assert (chosen(0, 1), chosen(100, 1), chosen(400, 1)) == (128, 128, 512)
    assert share(2**14, 1) == 0.9
    assert share(2**14, 32) == pytest.approx(0.7 * 2**14 / (2**14 + 31 * 128))
    # Elsewhere the default, whose sums are no larger in fp32.
    assert choose_tiles(2**20, 4, "bfloat16", "TPU v4") == ((512, 1024, 1024), (512, 1024, 1024))
    assert choose_tiles(2**20, 4, "float32", "TPU v5p") == ((512, 512, 512), (512, 512, 512))
    assert tpu_tiles.share_of_peak("TPU v4", "gmm", 2**20, 4) is None
    tpu_tiles._table.cache_clear()


def test_the_search_keeps_tiles_that_compile(tmp_path, monkeypatch, capsys):
    def predict(call, chip):
        if call.tiles[2] == 3072:
            raise ProfileError("does not fit")
        return call.tiles[0] / 2048

    table = tmp_path / "tiles.json"
    table.write_text('{"rows": []}')
    monkeypatch.setattr(tpu_search, "TABLE", table)
    monkeypatch.setattr(tpu_figures.Call, "predict", predict)
    monkeypatch.setattr(tpu_search, "compiler_version", lambda: "0")
    monkeypatch.setattr(tune, "missing_compiler", lambda: None)
    assert tune.main(["--kernels=grouped", "--chips=tpu7x"]) == 0
    assert "tpu7x bfloat16 gmm 512 x 1024 x 3072: does not fit" in capsys.readouterr().out
    (row,) = json.loads(table.read_text())["rows"]
    assert (row["device"], row["by"]) == ("TPU7x", "static cycles, libtpu 0")
    assert [1024, 1024, 1536, 0.5] in row["gmm"]
    assert [512, 1024, 512, 0.25] in row["tgmm"]
    assert not any(outputs == 3072 for _, _, outputs, _ in row["gmm"])


@pytest.mark.parametrize("kernel", tpu_figures.KERNELS)
def test_kernels_that_stand_for_megablox_compute_the_same(kernel):
    call = tpu_figures.Call(kernel, (128, 128, 256), group=256, groups=2, inputs=256, outputs=512, dtype="float32")
    rng = np.random.default_rng(3)
    x, w, dy = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((512, 256), (2, 256, 512), (512, 512)))
    with pltpu.force_tpu_interpret_mode():
        function, _ = tpu_figures.case(**dataclasses.asdict(call))
        got = function(x, w if kernel == "gmm" else dy)
    sizes = jnp.asarray([256, 256], jnp.int32)
    y, pullback = jax.vjp(lambda w: grouped_matmul(x, w, sizes, implementation="reference"), w)
    want = y if kernel == "gmm" else pullback(dy)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="do not divide"):
        dataclasses.replace(call, tiles=(128, 128, 384))


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


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_every_tile_compiles(chip):
    of = (CHIPS[chip].device_kind, "bfloat16")
    (row,) = (row for row in read_rows(tpu_tiles.TABLE) if (row["device"], row["dtype"]) == of)
    product, gradient = ([Tile(*tile) for *tile, _ in row[kernel]] for kernel in ("gmm", "tgmm"))
    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 6144), (2, 6144, 9216), (4096, 9216)))

    def run(x, w, sizes, dy):
        for tiles in itertools.zip_longest(product, gradient, fillvalue=gradient[0]):
            tiles = Tiles(*tiles)
            y, pullback = jax.vjp(lambda x, w, tiles=tiles: grouped_matmul_tpu(x, w, sizes, tiles), x, w)
            yield y, pullback(dy)

    compile_for_chip(CHIPS[chip], lambda *x: list(run(*x)), x, w, jax.ShapeDtypeStruct((2,), jnp.int32), dy)


def test_mistakes_are_named():
    x, w = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5))
    with pytest.raises(ValueError, match="do not fit"):
        grouped_matmul(x, w, jnp.asarray([1, 1, 1], jnp.int32))
    with pytest.raises(ValueError, match="do not fit"):
        grouped_matmul(x.astype(jnp.bfloat16), w, jnp.asarray([1, 1], jnp.int32))
    with pytest.raises(ValueError, match="not one of"):
        grouped_matmul(x, w, jnp.asarray([1, 1], jnp.int32), implementation="sparse")
