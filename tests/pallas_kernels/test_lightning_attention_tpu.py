"""The TPU kernels of lightning attention in the interpreter: values and every gradient against the token recurrence.

Memory that nobody wrote reads as NaN, and reads that race with writes are errors.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.lightning_attention import (
    lightning_attention,
    lightning_attention_extend,
    lightning_attention_step,
)
from pallas_kernels.lightning_attention.reference import lightning_attention_reference
from pallas_kernels.lightning_attention.tpu import lightning_attention_tpu
from pallas_kernels.lightning_attention.tpu_block import Boundaries, interleave
from pallas_kernels.lightning_attention.tpu_plan import Tiles
from pallas_kernels.lightning_attention.tpu_tiles import choose_tiles

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
# The strongest slope of the released model, one that hardly forgets, a middling one and none.
SLOPES = (0.917, 0.0004, 0.1, 0.0)
SHORT = Tiles(block=128, chunk=128, heads=2, lag=1, fused=False)
LONG = Tiles(block=256, chunk=128, heads=2, lag=2, fused=False)
FUSED = Tiles(block=256, chunk=128, heads=4, lag=3, fused=True)
WIDE = Tiles(block=512, chunk=256, heads=1, lag=0, fused=True)

# (batch, tokens, heads, key channels, value channels, dtype, tiles)
CASES = {
    "whole blocks": (1, 512, 2, 128, 128, "float32", LONG),
    "one token": (2, 1, 1, 128, 128, "float32", SHORT),
    "ragged": (2, 300, 4, 128, 128, "float32", FUSED),
    "a chunk with no token": (1, 385, 1, 128, 128, "float32", WIDE),
    "bfloat16": (1, 700, 4, 128, 128, "bfloat16", FUSED),
    "bfloat16, products apart": (1, 400, 2, 128, 128, "bfloat16", LONG),
    "64 channels": (1, 130, 3, 64, 64, "float32", SHORT),
    "64 channels in pairs": (1, 300, 4, 64, 64, "float32", FUSED),
    "64 channels in pairs, bfloat16": (1, 300, 4, 64, 64, "bfloat16", LONG),
    "96 channels and 64": (1, 130, 2, 96, 64, "float32", SHORT),
    "64 channels and 256": (1, 130, 1, 64, 256, "float32", LONG),
    "256 channels and 128": (1, 130, 1, 256, 128, "float32", FUSED),
    "256 channels, bfloat16": (1, 256, 1, 256, 256, "bfloat16", FUSED),
}
DOCUMENTS = {
    "no ids": lambda rng, B, S: None,
    "random lengths": lambda rng, B, S: np.sort(rng.integers(0, 5, (B, S)), axis=1),
    "ids that come back": lambda rng, B, S: rng.integers(0, 2, (B, S)),
}


def operands(rng, B, S, H, K, V, dtype):
    q, k = (jnp.asarray(rng.normal(size=(B, S, H, K)) * K**-0.25, dtype) for _ in range(2))
    v, do = (jnp.asarray(rng.normal(size=(B, S, H, V)), dtype) for _ in range(2))
    state, dstate = (jnp.asarray(rng.normal(size=(B, H, K, V)), jnp.float32) for _ in range(2))
    return (q, k, v, state), (do, dstate)


@functools.partial(jax.jit, static_argnums=(0,))
def value_and_gradients(function, arguments, cotangents, *rest):
    outputs, pullback = jax.vjp(lambda *arguments: function(*arguments, *rest), *arguments)
    return outputs, pullback(cotangents)


@functools.cache
def kernel(tiles):
    return lambda q, k, v, state, slopes, ids: lightning_attention_tpu(
        q, k, v, slopes, ids, state, tiles, tiles, INTERPRET
    )


def recurrence(q, k, v, state, slopes, ids):
    return lightning_attention_reference(q, k, v, slopes, ids, state)


def compare(arguments, cotangents, tiles, ids, dtype):
    slopes = jnp.asarray(SLOPES[: arguments[0].shape[2]], jnp.float32)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (arguments, cotangents))
    got = value_and_gradients(kernel(tiles), arguments, cotangents, slopes, ids)
    want = value_and_gradients(recurrence, *wide, slopes, ids)
    # The recurrence multiplies by a rounded decay at every token. bf16 products round their operands; sums are fp32.
    tolerance = 2e-5 if dtype == "float32" else 1.5e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


# Every case with documents; what is left out of a kernel without any, and ids that come back, on a few.
PAIRS = [(case, "random lengths") for case in CASES]
PAIRS += [(case, "no ids") for case in ("whole blocks", "one token", "ragged", "64 channels in pairs")]
PAIRS += [(case, "ids that come back") for case in ("one token", "a chunk with no token")]


@pytest.mark.parametrize(("case", "documents"), PAIRS)
def test_kernels_equal_recurrence(case, documents):
    *shape, dtype, tiles = CASES[case]
    rng = np.random.default_rng(0)
    ids = DOCUMENTS[documents](rng, *shape[:2])
    compare(*operands(rng, *shape, dtype), tiles, ids if ids is None else jnp.asarray(ids), dtype)


@pytest.mark.parametrize(
    "starts", [range(0, 256, 17), pytest.param(range(256), marks=pytest.mark.slow)], ids=["some", "every"]
)
def test_document_starting_at_any_position_of_a_block(starts):
    # One compiled program, a boundary at each position in turn.
    rng = np.random.default_rng(1)
    arguments, cotangents = operands(rng, 1, 256, 1, 128, 128, "float32")
    for start in starts:
        compare(arguments, cotangents, LONG, jnp.asarray(np.arange(256)[None] >= start, jnp.int32), "float32")


def test_boundaries_of_documents():
    starts = np.zeros((2, 300), bool)
    starts[0, [5, 130, 140, 256]] = True
    marks, ends = Boundaries.of(jnp.asarray(starts), LONG)
    first, last = Boundaries(np.asarray(marks), ends).first_and_last(np.arange(8))
    np.testing.assert_array_equal(first, [5, 2, 0, 128, 128, 128, 128, 128])
    np.testing.assert_array_equal(last, [5, 12, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(ends[0, 0, [0, 4, 5, 127, 128, 130, 140, 256]], [5, 5, 128, 128, 2, 12, 128, 128])
    assert (np.asarray(ends[1]) == 128).all()


def test_interleaving_keeps_the_order_of_a_stage():
    seen = []

    def item(index):
        for stage in range(3):
            seen.append((stage, index))
            yield

    interleave([item(index) for index in range(6)], stages=3, lag=2)
    for stage in range(3):
        assert [index for s, index in seen if s == stage] == list(range(6))
    assert seen.index((1, 0)) > seen.index((0, 1))


def test_op_runs_the_kernel_in_the_interpreter():
    rng = np.random.default_rng(2)
    (q, k, v, state), _ = operands(rng, 2, 37, 3, 64, 96, "bfloat16")
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 37)), axis=1))
    slopes = jnp.asarray(SLOPES[:3], jnp.float32)
    run = functools.partial(lightning_attention, q, k, v, slopes, segment_ids_BS=ids, initial_state_BHKV=state)
    (o, final), (want_o, want_final) = run(implementation="tpu_interpret"), run(implementation="reference")
    assert o.dtype == jnp.bfloat16
    assert final.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(o, np.float32), np.asarray(want_o, np.float32), atol=0.3, rtol=0.05)
    np.testing.assert_allclose(final, want_final, atol=0.05)


def test_slopes_get_no_gradient():
    rng = np.random.default_rng(3)
    (q, k, v, _), _ = operands(rng, 1, 9, 1, 64, 64, "float32")
    run = lambda slopes: jnp.sum(lightning_attention(q, k, v, slopes, implementation="tpu_interpret")[0])  # noqa: E731
    assert jax.grad(run)(jnp.ones(1)) == 0


DECODE = {
    "one token": (2, 1, 8, 128, 128, "bfloat16"),
    "odd heads": (1, 4, 3, 128, 256, "float32"),
    "several programs": (1, 8, 32, 128, 128, "float32"),
    "one token, fp32": (1, 1, 3, 256, 128, "float32"),
    "all rows of a square, bfloat16": (2, 8, 16, 128, 128, "bfloat16"),
    "odd heads, bfloat16": (1, 2, 3, 256, 128, "bfloat16"),
}


@pytest.mark.parametrize("case", DECODE)
def test_decode_kernel_equals_recurrence(case):
    *shape, dtype = DECODE[case]
    (q, k, v, state), _ = operands(np.random.default_rng(4), *shape, dtype)
    slopes = jnp.linspace(0.0, 0.917, shape[2])
    o, final = lightning_attention_extend(q, k, v, slopes, state, implementation="tpu_interpret")
    assert o.dtype == dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    want_o, want_final = lightning_attention_reference(q, k, v, slopes, None, state)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert np.abs(np.asarray(o, np.float32) - want_o).max() <= tolerance * np.abs(want_o).max()
    np.testing.assert_allclose(final, want_final, rtol=1e-5, atol=1e-5)


def test_decode_forms_agree():
    (q, k, v, state), _ = operands(np.random.default_rng(5), 1, 3, 2, 128, 128, "float32")
    slopes = jnp.asarray([0.5, 0.01])
    want_o, want_final = lightning_attention_extend(q, k, v, slopes, state, implementation="plain")
    for t in range(3):
        o, state = lightning_attention_step(q[:, t], k[:, t], v[:, t], slopes, state)
        np.testing.assert_allclose(o, want_o[:, t], atol=1e-5)
    np.testing.assert_allclose(state, want_final, atol=1e-5)


def tpu_mesh(kind, axis_type=AxisType.Explicit, size=1):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((size,), ("x",), (axis_type,), abstract_device=device))


def traced(dtype="bfloat16", channels=128):
    q = jax.ShapeDtypeStruct((2, 64, 4, channels), dtype)
    return str(jax.make_jaxpr(lambda q: lightning_attention(q, q, q, jnp.ones(4))[0])(q))


def test_auto_takes_the_kernel_on_a_mesh_of_tpus():
    assert "lightning_attention_forward" not in traced()
    with tpu_mesh("TPU v5"):
        assert "lightning_attention_forward" in traced()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"dtype": "float16"}, "bfloat16 and float32"), ({"channels": 512}, "up to 256 channels")],
)
def test_auto_falls_back_with_a_reason(arguments, reason, caplog):
    with tpu_mesh("TPU v5"):
        assert "lightning_attention_forward" not in traced(**arguments)
    assert reason in caplog.text


def test_auto_falls_back_where_arrays_are_split(caplog):
    with tpu_mesh("TPU v5", AxisType.Auto, size=2):
        assert "lightning_attention_forward" not in traced()
    assert "in a shard_map" in caplog.text


def test_forced_kernel_says_why_it_cannot_run():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match="traced for cpu; 'tpu_interpret'"):
        lightning_attention(q, q, q, jnp.ones(2), implementation="tpu")
    with pytest.raises(NotImplementedError, match="traced for cpu"):
        lightning_attention_step(
            *[jnp.zeros((1, 2, 128))] * 3, jnp.ones(2), jnp.zeros((1, 2, 128, 128)), implementation="tpu"
        )
    with pytest.raises(NotImplementedError, match="128 or 256 channels"):
        lightning_attention_step(*[q[:, 0]] * 3, jnp.ones(2), jnp.zeros((1, 2, 8, 8)), implementation="tpu_interpret")


def test_tiles_fit_the_call():
    q = jax.ShapeDtypeStruct((1, 5, 64, 256), jnp.float32)
    for tiles in choose_tiles(q, q):
        assert tiles.block == tiles.chunk
    q = jax.ShapeDtypeStruct((1, 8192, 4, 128), jnp.bfloat16)
    with tpu_mesh("TPU v5"):
        # A program for each of the two cores.
        assert all(tiles.heads == 2 for tiles in choose_tiles(q, q))
