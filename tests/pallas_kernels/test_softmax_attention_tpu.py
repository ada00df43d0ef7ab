"""Splash attention behind our operation: values and gradients in the interpreter, and the real compiler's word.

Memory that nobody wrote reads as NaN. No TPU is needed to compile; where libtpu is missing, those tests are skipped.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.aot import CHIPS, compile_for_chip, missing_compiler
from pallas_kernels.softmax_attention import SOFTMAX_RESIDUALS, softmax_attention, tpu, tpu_tables
from pallas_kernels.softmax_attention.part import Places
from pallas_kernels.softmax_attention.reference import softmax_attention_reference
from pallas_kernels.softmax_attention.tpu_blocks import choose_blocks
from pallas_kernels.softmax_attention.tpu_kernels import Kernels

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
SMALL = BlockSizes(*[128] * 8)
OBLONG = BlockSizes(128, 256, 128, 256, 128, 128, 128, 256)
# All gradients by one kernel, whose blocks of keys are worked on whole or in two steps.
FUSED = BlockSizes(128, 128, 128, 128, 128, 128, use_fused_bwd_kernel=True)
FUSED_STEPS = BlockSizes(256, 128, 128, 128, 256, 128, use_fused_bwd_kernel=True)

# (batch, tokens, query heads, key-value heads, key channels, value channels, dtype, blocks, document ids)
CASES = {
    "one document": (1, 384, 2, 1, 64, 64, "float32", SMALL, None),
    "ragged documents": (
        2,
        300,
        4,
        2,
        128,
        64,
        "float32",
        SMALL,
        lambda rng, B, S: np.sort(rng.integers(0, 5, (B, S))),
    ),
    "documents at edges of blocks": (
        1,
        512,
        2,
        1,
        64,
        64,
        "float32",
        OBLONG,
        lambda rng, B, S: np.arange(S)[None] // 128,
    ),
    "one kernel backward, one document": (1, 384, 2, 1, 64, 64, "float32", FUSED_STEPS, None),
    "one kernel backward, ragged documents": (
        2,
        300,
        4,
        2,
        128,
        64,
        "float32",
        FUSED,
        lambda rng, B, S: np.sort(rng.integers(0, 5, (B, S))),
    ),
    "one kernel backward, training precision": (
        1,
        700,
        2,
        1,
        128,
        128,
        "bfloat16",
        FUSED_STEPS,
        lambda rng, B, S: np.sort(rng.integers(0, 3, (B, S))),
    ),
    "ids that come back": (1, 256, 2, 2, 128, 128, "bfloat16", SMALL, lambda rng, B, S: rng.integers(0, 2, (B, S))),
}


def value_and_gradients(function, arguments, cotangent):
    @jax.jit
    def run(*arguments):
        o, pullback = jax.vjp(function, *arguments)
        return o, pullback(cotangent)

    return jax.tree.leaves(run(*arguments))


def compare(case, interpret=INTERPRET):
    B, S, H, G, K, V, dtype, blocks, documents = CASES[case]
    rng = np.random.default_rng(0)
    ids = None if documents is None else jnp.asarray(documents(rng, B, S))
    sizes = ((H, K), (G, K), (G, V), (H, V))
    *arguments, cotangent = (jnp.asarray(rng.normal(size=(B, S, heads, width)), dtype) for heads, width in sizes)
    got = value_and_gradients(
        lambda q, k, v: tpu.softmax_attention_tpu(q, k, v, ids, 0.1, Kernels(blocks, interpret)), arguments, cotangent
    )
    wide = [x.astype(jnp.float32) for x in arguments]
    want = value_and_gradients(
        lambda q, k, v: softmax_attention_reference(q, k, v, ids, 0.1), wide, cotangent.astype(jnp.float32)
    )
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert np.abs(a.astype(jnp.float32) - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_reference(case):
    compare(case)


def test_rows_whose_tables_are_cut_into_parts(monkeypatch):
    # As for a million tokens: half of the queries a call.
    monkeypatch.setattr(tpu, "SCALAR_BYTES", 8 * tpu_tables.TABLE_BYTES // 2)
    kernels = Kernels(OBLONG, INTERPRET)
    assert tpu._cuts(500, kernels) == [(slice(0, 256), slice(256)), (slice(256, 500), slice(500))]
    compare("documents at edges of blocks")


@pytest.mark.parametrize("blocks", [2, 3, 507, 509, 510, 511, 512])
def test_tables_of_every_piece_fit(blocks):
    S = 2048 * blocks - 1
    q = jax.ShapeDtypeStruct((1, S, 8, 128), jnp.bfloat16)
    for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        chosen = choose_blocks(q, q, kind)
        cuts = tpu._cuts(S, Kernels(chosen, False))
        assert [t for own, _ in cuts for t in (own.start, own.stop)][1:-1:2] == [own.start for own, _ in cuts[1:]]
        assert (cuts[0][0].start, cuts[-1][0].stop) == (0, S)
        for own, seen in cuts:
            assert own.stop == seen.stop
            assert tpu_tables.table_bytes(own.stop - own.start, S, chosen) <= tpu_tables.SCALAR_BYTES


@pytest.mark.parametrize("case", ["one document", "ragged documents", "one kernel backward, ragged documents"])
def test_halves_of_the_heads_on_two_cores(case):
    # Which jax 0.10.2's stricter interpreter does not follow.
    compare(case, interpret=True)


def test_tables_leave_out_what_documents_exclude():
    runs_S = jnp.asarray(np.repeat([0, 1, 2], [200, 184, 128]), jnp.int32)
    positions_S = jnp.arange(512, dtype=jnp.int32)
    arguments = *[Places(positions_S[None], runs_S[None])] * 2, positions_S, 128, 128
    by_query, by_key = tpu_tables.query_tables(*arguments), tpu_tables.key_tables(*arguments)
    for tables in (by_query, by_key):
        np.testing.assert_array_equal(tables.block_mask[0], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]])
    # What is fetched is what is computed, else what will be next.
    np.testing.assert_array_equal(by_query.data_next[0], [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 2, 3], [3, 3, 3, 3]])
    np.testing.assert_array_equal(by_key.data_next[0], [[0, 1, 2, 3], [1, 1, 2, 3], [0, 2, 2, 3], [0, 1, 2, 3]])


def tpu_mesh(axis_type=AxisType.Explicit, size=1):
    device = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((size,), ("x",), (axis_type,), abstract_device=device))


def traced(dtype="bfloat16", channels=128, tokens=256):
    q, k = (jax.ShapeDtypeStruct((2, tokens, heads, channels), dtype) for heads in (4, 2))
    return str(jax.make_jaxpr(softmax_attention)(q, k, k))


def test_auto_takes_the_kernels_on_a_mesh_of_tpus():
    assert "splash_mha_fwd" not in traced()
    with tpu_mesh():
        assert "splash_mha_fwd" in traced()


def test_a_policy_keeps_the_output_once_and_needs_no_second_pass():
    S, H, G, K, V = 128, 2, 1, 64, 128
    arguments = [jax.ShapeDtypeStruct((1, S, heads, width), jnp.float32) for heads, width in ((H, K), (G, K), (G, V))]
    layer = lambda q, k, v: jnp.sin(softmax_attention(q, k, v))  # noqa: E731

    def kept(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        pull = lambda *arguments: jax.vjp(jax.checkpoint(layer, policy=policy), *arguments)[1]  # noqa: E731
        both = lambda *arguments: pull(*arguments)(jnp.ones((1, S, H, V)))  # noqa: E731
        held = [x.size for x in jax.tree.leaves(jax.eval_shape(pull, *arguments)) if x.size in (S * H * V, S * H)]
        return sorted(held), str(jax.make_jaxpr(both)(*arguments)).count("name=splash_mha_fwd")

    with tpu_mesh():
        assert kept(SOFTMAX_RESIDUALS) == ([S * H, S * H * V], 1)
        assert kept() == ([], 2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": "float16"}, "bfloat16 and float32"),
        ({"channels": 96}, "64, 128 or 256 channels"),
        ({"tokens": 2**20 + 1}, "up to 1,048,576 tokens"),
    ],
)
def test_auto_falls_back_with_a_reason(arguments, reason, caplog):
    with tpu_mesh():
        assert "splash_mha_fwd" not in traced(**arguments)
    assert reason in caplog.text


def test_auto_falls_back_where_arrays_are_split(caplog):
    with tpu_mesh(AxisType.Auto, size=2):
        assert "splash_mha_fwd" not in traced()
    assert "in a shard_map" in caplog.text


def test_forced_kernels_say_why_they_cannot_run():
    q = jnp.zeros((1, 4, 2, 64))
    with pytest.raises(NotImplementedError, match="traced for cpu; 'tpu_interpret'"):
        softmax_attention(q, q, q, implementation="tpu")
    with pytest.raises(NotImplementedError, match="64, 128 or 256 channels"):
        softmax_attention(*[jnp.zeros((1, 4, 2, 8))] * 3, implementation="tpu_interpret")


def lower_gradient(B, S, H, G, K, dtype):
    q, k = (jax.ShapeDtypeStruct((B, S, heads, K), dtype) for heads in (H, G))

    def run(q, k, v, ids, do):
        o, pullback = jax.vjp(lambda q, k, v: softmax_attention(q, k, v, segment_ids_BS=ids), q, k, v)
        return o, pullback(do)

    return run, (q, k, k, jax.ShapeDtypeStruct((B, S), jnp.int32), q)


compiled_for_tpu = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
slow = pytest.mark.slow


@compiled_for_tpu
@pytest.mark.parametrize(
    ("chip", "size"),
    [
        # The released model's heads, packed documents.
        ("v5p", (1, 8192, 64, 8, 128, "bfloat16")),
        ("v6e", (1, 8192, 64, 8, 128, "bfloat16")),
        pytest.param("v5e", (1, 8192, 64, 8, 128, "bfloat16"), marks=slow),
        pytest.param("tpu7x", (1, 8192, 64, 8, 128, "bfloat16"), marks=slow),
        pytest.param("v5p", (2, 1000, 4, 2, 64, "bfloat16"), marks=slow),
        pytest.param("v5p", (1, 4096, 4, 2, 256, "float32"), marks=slow),
        pytest.param("v6e", (1, 4096, 4, 2, 256, "float32"), marks=slow),
        # A million tokens, heads split over eight devices.
        pytest.param("v5p", (1, 2**20, 8, 1, 128, "bfloat16"), marks=slow),
        pytest.param("v6e", (1, 2**20, 8, 1, 128, "bfloat16"), marks=slow),
    ],
    ids=str,
)
def test_gradients_compile(chip, size):
    function, shapes = lower_gradient(*size)
    text = compile_for_chip(CHIPS[chip], function, *shapes).as_text()
    q = jax.ShapeDtypeStruct((size[0], size[1], size[2], size[4]), size[5])
    fused = choose_blocks(q, q, CHIPS[chip].device_kind).use_fused_bwd_kernel
    assert fused == (size[1] == 8192)
    assert all(f"splash_mha_{kernel}_segmented" in text for kernel in ("fwd", "dkv"))
    assert ("splash_mha_dq_segmented" in text) != fused


@slow
@compiled_for_tpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_every_choice_of_blocks_compiles(chip):
    lengths, kind = [2**n for n in range(9, 21)], CHIPS[chip].device_kind
    row = lambda S: jax.ShapeDtypeStruct((1, S, 2, 128), jnp.bfloat16)  # noqa: E731
    choices = {choose_blocks(row(S), row(S), kind, whole_row) for S in lengths for whole_row in (True, False)}
    assert len(choices) > 2
    q, k = (jax.ShapeDtypeStruct((1, 8192, heads, 128), jnp.bfloat16) for heads in (4, 2))

    def run(q, k, v, ids, do):
        for blocks in choices:
            attend = lambda q, k, v, blocks=blocks: tpu.softmax_attention_tpu(q, k, v, ids, 1.0, Kernels(blocks, False))  # noqa: E731
            o, pullback = jax.vjp(attend, q, k, v)
            yield o, pullback(do)

    compile_for_chip(CHIPS[chip], lambda *x: list(run(*x)), q, k, k, jax.ShapeDtypeStruct((1, 8192), jnp.int32), q)


def test_a_million_tokens_trace_at_once():
    function, shapes = lower_gradient(1, 2**20, 64, 8, 128, "bfloat16")
    with tpu_mesh():
        start = time.monotonic()
        jax.make_jaxpr(function)(*shapes)
        # jax's own tables look at each of 10^12 pairs of tokens.
        assert time.monotonic() - start < 30
