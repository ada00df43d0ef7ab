"""Ring attention against one device, values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.bench.parallel.program import communication
from mmx.parallel.ring import RING_RESIDUALS, ring_attention
from mmx.parallel.sequence_layout import SequenceLayout
from pallas_kernels.softmax_attention import softmax_attention
from tests.mmx.parallel.collectives import collectives
from tests.mmx.parallel.rows import (
    AXIS,
    LENGTH,
    RANKS_AND_LAYOUTS,
    SEGMENTS,
    TOKENS,
    assert_same,
    order,
    rank_mesh,
    split,
    with_gradients,
)

B, H, G, K = 2, 4, 2, 8


def operands(dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, LENGTH, heads, K)).astype(dtype) for heads in (H, G, G, H)]


def on_ranks(ranks, layout, block, cotangent, implementation="auto"):
    """Outputs and gradients of ring attention for rows with the given segment ids; compiled once."""
    layout = SequenceLayout(layout)

    def function(q, k, v, segment_ids, slice_ids):
        how = {"block": block, "implementation": implementation}
        return ring_attention(q, k, v, segment_ids, axis=AXIS, layout=layout, slice_ids_BN=slice_ids, **how)

    compiled = with_gradients(split(function, ranks, layout), cotangent)
    return lambda q, k, v, segment_ids, given=True: compiled(
        *(q, k, v, segment_ids if given else None, order(ranks, layout, segment_ids))
    )


@functools.cache
def on_one_device(name):
    *qkv, do = operands()
    function = lambda q, k, v, s: softmax_attention(q, k, v, segment_ids_BS=s, implementation="reference")  # noqa: E731
    return jax.device_get(with_gradients(function, do)(*qkv, SEGMENTS[name]))


@pytest.mark.usefixtures("float64")
# Blocks that divide a slice, that do not, and that are as long as a rank's share.
@pytest.mark.parametrize(
    ("ranks", "layout", "block"),
    [(*case, block) for case, block in zip(RANKS_AND_LAYOUTS, (16, 16, 12, 5, 48, 10, 6, 7, 4, 3), strict=True)],
)
def test_same_as_one_device(ranks, layout, block):
    *qkv, do = operands()
    compiled = on_ranks(ranks, layout, block, do)
    for name, segment_ids in SEGMENTS.items():
        assert_same(compiled(*qkv, segment_ids), on_one_device(name), 1e-11)
    # The same documents without ids.
    whole = "one document over all ranks"
    assert_same(compiled(*qkv, SEGMENTS[whole], given=False), on_one_device(whole), 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", (1e-5, 1e-4)), ("bfloat16", (3e-2, 3e-2))])
def test_training_precisions(dtype, tolerance):
    *qkv, do = operands(np.float32)
    narrow = [jnp.asarray(x, dtype) for x in qkv]
    got = on_ranks(4, "zigzag", 5, do)(*narrow, SEGMENTS["padding behind"])
    assert {x.dtype for x in got.values()} == {jnp.dtype(dtype)}
    with jax.enable_x64(True):
        function = lambda q, k, v, s: softmax_attention(q, k, v, segment_ids_BS=s, implementation="reference")  # noqa: E731
        wide = [np.asarray(x, np.float64) for x in narrow]
        want = jax.device_get(with_gradients(function, do)(*wide, SEGMENTS["padding behind"]))
    got = {name: np.asarray(x, np.float64) for name, x in got.items()}
    assert_same({"o": got["o"]}, {"o": want.pop("o")}, tolerance[0])
    assert_same(got, want, tolerance[1])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_excluded_blocks_are_not_computed(layout):
    # A weight of 0 times a NaN is a NaN: masking alone would spread it.
    q, k, v, do = operands(np.float32)
    segment_ids = np.tile(np.arange(LENGTH) // 48, (B, 1))
    poisoned = segment_ids == 1
    v[poisoned] = np.nan
    got = on_ranks(4, layout, 12, do)(q, k, v, segment_ids)
    for name, x in got.items():
        assert np.isnan(x[poisoned]).any(axis=-1).all() or name == "dv", name
        assert np.isfinite(x[~poisoned]).all(), name


# Rows long enough for several of the kernels' blocks, of as many channels as they take.
KERNEL_CHANNELS, TIMES, BLOCK = 64, 4, 128


def wide_operands():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, LENGTH * TIMES, heads, KERNEL_CHANNELS)).astype(np.float32) for heads in (H, G, G, H)]


@functools.cache
def wide_on_one_device(name):
    *qkv, do = wide_operands()
    function = lambda q, k, v, s: softmax_attention(q, k, v, segment_ids_BS=s, implementation="reference")  # noqa: E731
    return jax.device_get(with_gradients(function, do)(*qkv, np.repeat(SEGMENTS[name], TIMES, axis=1)))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "zigzag"),
        (4, "balanced"),
        pytest.param(4, "contiguous", marks=pytest.mark.slow),
        pytest.param(8, "zigzag", marks=pytest.mark.slow),
    ],
)
def test_kernels_serve_the_ring(ranks, layout):
    *qkv, do = wide_operands()
    compiled = on_ranks(ranks, layout, BLOCK, do, "tpu_interpret")
    for name, segment_ids in SEGMENTS.items():
        assert_same(compiled(*qkv, np.repeat(segment_ids, TIMES, axis=1)), wide_on_one_device(name), 2e-5)
    if layout == "zigzag":
        whole = "one document over all ranks"
        ids = np.repeat(SEGMENTS[whole], TIMES, axis=1)
        assert_same(compiled(*qkv, ids, given=False), wide_on_one_device(whole), 2e-5)


def gradients(ranks, layout, length, dtype=jnp.float32, heads=(H, G), form=ring_attention):
    """Of every rank's tokens, and arguments to trace it with."""
    layout = SequenceLayout(layout)
    mesh = rank_mesh(ranks)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(TOKENS,) * 5, out_specs=(TOKENS,) * 3, check_vma=False)
    def function(q, k, v, do, segment_ids):
        attend = lambda q, k, v: form(q, k, v, segment_ids, axis=AXIS, layout=layout)  # noqa: E731
        return jax.vjp(attend, q, k, v)[1](do)

    sharding = jax.NamedSharding(mesh, TOKENS)
    of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((1, length, *shape), dtype, sharding=sharding)  # noqa: E731
    q, k = of(heads[0], K), of(heads[1], K)
    return function, (q, k, k, q, of(dtype=jnp.int32))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_only_key_value_heads_travel(layout, ranks):
    function, arguments = gradients(ranks, layout, LENGTH, jnp.bfloat16)
    found = communication(function, ranks, *arguments).collectives
    tokens = LENGTH // ranks
    sent = lambda dtype: sum(c.result_bytes * c.times for c in found if (c.kind, c.dtype) == ("ppermute", dtype))  # noqa: E731
    # Twice around the ring but for the last step, keys and values and the documents' numbers; their gradients all the
    # way home.
    assert sent("bfloat16") == 2 * (ranks - 1) * tokens * 2 * G * K * 2
    assert sent("int32") == 2 * (ranks - 1) * tokens * 4
    assert sent("float32") == ranks * tokens * 2 * G * K * 4
    (edges,) = [c for c in found if c.kind != "ppermute"]
    assert (edges.kind, edges.result_bytes) == ("all_gather", SequenceLayout(layout).slice_ids(ranks).size * 4 * 4)


def test_the_compiled_program_adds_no_collective():
    function, arguments = gradients(2, "zigzag", LENGTH)
    compiled = collectives(jax.jit(function).lower(*arguments).compile())
    # With two ranks nothing is left in the loops. Both passes send keys, values and numbers, once in this program.
    assert [c.kind for c in compiled if c.kind != "collective-permute"] == ["all-gather"]
    assert len(compiled) == 1 + 3 + 2 * 2


def test_kept_residuals_spare_the_backward_pass_a_ring():
    def sent(policy):
        def form(*tokens, **where):
            return jax.checkpoint(functools.partial(ring_attention, **where), policy=policy)(*tokens)

        function, arguments = gradients(4, "zigzag", LENGTH, jnp.bfloat16, form=form)
        found = communication(function, 4, *arguments).collectives
        return sum(c.times for c in found if (c.kind, c.dtype) == ("ppermute", "bfloat16"))

    # Keys and values, three steps.
    assert sent(jax.checkpoint_policies.nothing_saveable) == 3 * 2 * 3
    assert sent(jax.checkpoint_policies.save_only_these_names(RING_RESIDUALS)) == 2 * 2 * 3


@pytest.mark.parametrize("implementation", ["blocked", "tpu_interpret"])
def test_recomputation_keeps_nothing_of_the_steps(implementation):
    # What depends on the documents alone is the same in all layers: rematerialisation would compute it once, in a ring
    # of its own, and keep it for every step, constants in the shape of the output among it.
    ranks, layout = 8, SequenceLayout("zigzag")
    local = functools.partial(ring_attention, axis=AXIS, layout=layout, implementation=implementation)
    island = jax.shard_map(local, mesh=rank_mesh(ranks), in_specs=(TOKENS,) * 4, out_specs=TOKENS, check_vma=False)

    def loss(x, segment_ids):
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        def layer(x, _):
            keys = x[:, :, :G]
            return x + island(x, keys, keys, segment_ids), None

        return jnp.sum(jax.lax.scan(layer, x, None, length=3)[0])

    sharding = jax.NamedSharding(rank_mesh(ranks), TOKENS)
    of = lambda *shape, dtype: jax.ShapeDtypeStruct((1, 2048, *shape), dtype, sharding=sharding)  # noqa: E731
    with jax.set_mesh(rank_mesh(ranks)):
        program = str(jax.make_jaxpr(jax.grad(loss))(of(H, 64, dtype=jnp.float32), of(dtype=jnp.int32)))
    assert f"length={ranks - 2}" in program
    assert not re.findall(rf"\w+\[{ranks - 2},[\d,]+\]", program)


def test_no_score_matrix():
    # A rank's temporaries stay far below its own square of scores of one head.
    length, ranks = 16384, 2
    function, arguments = gradients(ranks, "zigzag", length, heads=(2, 1))
    temporaries = jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < ranks * (length // ranks) ** 2 * 4 / 16
