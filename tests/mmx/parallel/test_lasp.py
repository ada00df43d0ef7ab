"""Lightning attention split over ranks against one device, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.bench.parallel.program import communication
from mmx.parallel import lasp as module
from mmx.parallel.lasp import ENTERING_STATES, lasp, lasp_plus
from mmx.parallel.sequence_layout import SequenceLayout
from pallas_kernels.lightning_attention import lightning_attention
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

B, H, K, V = 2, 3, 8, 5
# The strongest slope of the released model, a middling one and one that hardly forgets.
SLOPES = np.asarray((0.917, 0.1, 0.0004))
FORMS = {"lasp_plus": lasp_plus, "lasp": lasp}


def operands(dtype=np.float64):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, LENGTH, H, width)).astype(dtype) for width in (K, K, V, V)]


@pytest.fixture(autouse=True)
def small_correction_blocks(monkeypatch):
    # Several blocks a slice, the last one overlapping, at the lengths of these tests.
    monkeypatch.setattr(module, "_CORRECTION_BLOCK", 5)


def on_ranks(form, ranks, layout, cotangent, dtype=np.float64):
    """Outputs and gradients of ``FORMS[form]`` for rows with the given segment ids; compiled once."""
    layout, slopes = SequenceLayout(layout), jnp.asarray(SLOPES, dtype)

    def function(q, k, v, segment_ids, slice_ids):
        slices = {} if slice_ids is None else {"slice_ids_BN": slice_ids}
        return FORMS[form](q, k, v, slopes, segment_ids, axis=AXIS, layout=layout, **slices)

    compiled = with_gradients(split(function, ranks, layout), cotangent)
    return lambda q, k, v, segment_ids, given=True: compiled(
        *(q, k, v, segment_ids if given else None, order(ranks, layout, segment_ids))
    )


@functools.cache
def on_one_device(name):
    *qkv, do = operands()
    function = lambda q, k, v, s: lightning_attention(q, k, v, jnp.asarray(SLOPES), segment_ids_BS=s)[0]  # noqa: E731
    return jax.device_get(with_gradients(function, do)(*qkv, SEGMENTS[name]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("form", "ranks", "layout"),
    [(form, *case) for form in FORMS for case in RANKS_AND_LAYOUTS if (form, case[1]) != ("lasp", "balanced")],
)
def test_same_as_one_device(form, ranks, layout):
    *qkv, do = operands()
    compiled = on_ranks(form, ranks, layout, do)
    for name, segment_ids in SEGMENTS.items():
        assert_same(compiled(*qkv, segment_ids), on_one_device(name), 1e-11)
    # The same documents without ids.
    whole = "one document over all ranks"
    assert_same(compiled(*qkv, SEGMENTS[whole], given=False), on_one_device(whole), 1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", (1e-5, 1e-4)), ("bfloat16", (3e-2, 3e-2))])
def test_training_precisions(dtype, tolerance):
    *qkv, do = operands(np.float32)
    narrow = [jnp.asarray(x, dtype) for x in qkv]
    got = on_ranks("lasp_plus", 4, "zigzag", do, np.float32)(*narrow, SEGMENTS["padding behind"])
    assert {x.dtype for x in got.values()} == {jnp.dtype(dtype)}
    with jax.enable_x64(True):
        function = lambda q, k, v, s: lightning_attention(q, k, v, jnp.asarray(SLOPES), segment_ids_BS=s)[0]  # noqa: E731
        wide = [np.asarray(x, np.float64) for x in narrow]
        want = jax.device_get(with_gradients(function, do)(*wide, SEGMENTS["padding behind"]))
    got = {name: np.asarray(x, np.float64) for name, x in got.items()}
    assert_same({"o": got["o"]}, {"o": want.pop("o")}, tolerance[0])
    assert_same(got, want, tolerance[1])


def gradients(form, ranks, layout, length):
    """Of every rank's tokens, and arguments to trace it with."""
    layout, mesh = SequenceLayout(layout), rank_mesh(ranks)
    slopes = jnp.asarray(SLOPES, jnp.float32)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(TOKENS,) * 5, out_specs=(TOKENS,) * 3, check_vma=False)
    def function(q, k, v, do, segment_ids):
        attend = lambda q, k, v: form(q, k, v, slopes, segment_ids, axis=AXIS, layout=layout)  # noqa: E731
        return jax.vjp(attend, q, k, v)[1](do)

    sharding = jax.NamedSharding(mesh, TOKENS)
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((B, length, *shape), dtype, sharding=sharding)  # noqa: E731
    return function, (of(H, K), of(H, K), of(H, V), of(H, V), of(dtype=jnp.int32))


def collectives_of(form, ranks, layout, length):
    function, arguments = gradients(form, ranks, layout, length)
    return collectives(jax.jit(function).lower(*arguments).compile())


@pytest.mark.parametrize(("layout", "slices"), [("contiguous", 4), ("zigzag", 8)])
def test_one_gather_of_states_each_way_whatever_the_length(layout, slices):
    ids, *states = sorted(collectives_of(lasp_plus, 4, layout, 96), key=lambda c: c.dtype, reverse=True)
    # Four integers a slice, and every slice's state, fp32, once forward and once backward.
    assert ids == ("all-gather", "s32", slices * B * 4 * 4)
    assert states == [("all-gather", "f32", slices * B * H * K * V * 4)] * 2
    assert sorted(collectives_of(lasp_plus, 4, layout, 960)) == sorted([ids, *states])


@pytest.mark.parametrize(("layout", "hops"), [("contiguous", 3), ("zigzag", 6)])
def test_serial_baseline_hands_one_state_at_a_time(layout, hops):
    found = collectives_of(lasp, 4, layout, 96)
    handed = [c for c in found if c.kind == "collective-permute"]
    assert handed == [("collective-permute", "f32", B * H * K * V * 4)] * 2 * hops
    assert len(found) - len(handed) == 1, "the documents' edges"


@pytest.mark.parametrize(("form", "steps"), [(lasp_plus, 1), (lasp, 7)])
def test_serial_steps(form, steps):
    # Forward and backward; LASP's first step also waits for the documents' edges.
    function, arguments = gradients(form, 8, "contiguous", LENGTH)
    assert communication(function, 8, *arguments).serial_steps == 2 * steps + (form is lasp)


def test_kept_states_spare_the_backward_pass_a_gather():
    def gathers(policy):
        def form(*tokens, **where):
            return jax.checkpoint(functools.partial(lasp_plus, **where), policy=policy)(*tokens)

        function, arguments = gradients(form, 4, "contiguous", LENGTH)
        found = communication(function, 4, *arguments).collectives
        return sum(c.dtype == "float32" for c in found)

    assert gathers(jax.checkpoint_policies.nothing_saveable) == 3
    assert gathers(jax.checkpoint_policies.save_only_these_names(ENTERING_STATES)) == 2


def test_mistakes_are_named():
    q = jnp.zeros((1, LENGTH, H, K))

    def call(form, name, segment_ids=None, **slices):
        local = lambda q: form(q, q, q, jnp.ones(H), segment_ids, axis=AXIS, layout=SequenceLayout(name), **slices)  # noqa: E731
        mesh = rank_mesh(2)
        island = jax.shard_map(local, mesh=mesh, in_specs=TOKENS, out_specs=TOKENS, check_vma=False)
        return jax.eval_shape(island, jax.device_put(q, jax.NamedSharding(mesh, TOKENS)))

    with pytest.raises(ValueError, match="the balanced layout needs slice_ids_BN"):
        call(lasp_plus, "balanced")
    with pytest.raises(ValueError, match="the zigzag layout takes no slice_ids_BN"):
        call(lasp_plus, "zigzag", slice_ids_BN=jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="not in the balanced layout"):
        call(lasp, "balanced")
