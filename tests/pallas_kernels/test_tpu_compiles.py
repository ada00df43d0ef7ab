"""Every TPU kernel through the real compiler at the real sizes, and its static cycles against a golden file.

No TPU is needed: libtpu compiles for one that is not there. The compiler is a 300 MB package, and these tests are
skipped where it is missing.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.aot import CHIPS, ProfileError, compile_for_chip, compiler_version, missing_compiler
from pallas_kernels.lightning_attention import LIGHTNING_STATES, lightning_attention, tpu_cases
from pallas_kernels.lightning_attention.tpu_figures import Call, DecodeCall
from pallas_kernels.lightning_attention.tpu_tiles import choose_tiles
from pallas_kernels.platform import target_platform
from pallas_kernels.softmax_attention import tpu_figures as softmax_figures
from pallas_kernels.softmax_attention.tpu_blocks import Sizes

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

GOLDEN = Path(__file__).parents[1] / "golden" / "tpu_cycles.json"
TARGETS = ("v5e", "v5p", "v6e", "tpu7x")
# Cycles may grow by this much.
BOUND = 1.05
# Compilers, and chips whose kernels their profiler aborts on.
ABORTS = {("0.0.42.1", "tpu7x")}


def gradient_program(documents):
    """Outputs, final state and all gradients, from operands of one batch."""

    def run(q, k, v, slopes, ids, state, do, dstate):
        assert target_platform() == "tpu"
        attend = lambda q, k, v, state: lightning_attention(  # noqa: E731
            q, k, v, slopes, segment_ids_BS=ids if documents else None, initial_state_BHKV=state
        )
        outputs, pullback = jax.vjp(attend, q, k, v, state)
        return outputs, pullback((do, dstate))

    return run


def shapes(B, S, H, K, V, dtype):
    q, v = (jax.ShapeDtypeStruct((B, S, H, width), dtype) for width in (K, V))
    slopes, ids = jax.ShapeDtypeStruct((H,), jnp.float32), jax.ShapeDtypeStruct((B, S), jnp.int32)
    state = jax.ShapeDtypeStruct((B, H, K, V), jnp.float32)
    return q, q, v, slopes, ids, state, v, state


def compile_gradient(chip, documents, *size):
    compiled = compile_for_chip(CHIPS[chip], gradient_program(documents), *shapes(*size))
    text = compiled.as_text()
    assert "lightning_attention_forward" in text
    assert "lightning_attention_backward" in text
    return compiled


@pytest.mark.parametrize(
    "chip", ["v5p", "tpu7x", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5e", "v6e"))]
)
def test_released_shape_compiles(chip):
    # 64 heads of 128 channels, packed documents, forward and backward in one program.
    compile_gradient(chip, True, 1, 8192, 64, 128, 128, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", *TARGETS])
@pytest.mark.parametrize(
    "size",
    [
        (1, 1_048_576, 8, 128, 128, "bfloat16"),  # a million tokens, heads split over eight devices
        (4, 1_048_576, 1, 128, 128, "bfloat16"),  # as many marks as the op lets through
        (1, 1000, 3, 64, 64, "bfloat16"),
        (1, 8192, 16, 64, 64, "bfloat16"),
        (2, 5, 2, 96, 128, "float32"),
        (1, 8192, 4, 256, 256, "float32"),
        (1, 8192, 64, 128, 128, "float32"),
    ],
    ids=str,
)
def test_other_shapes_compile(chip, size):
    if chip in ("v4", "v5e") and size[1] * size[0] * size[2] >= 2**22:
        pytest.skip("operands and gradients of this size are more than the 16 GB of this device")
    compile_gradient(chip, size[1] != 1000, *size)


@pytest.mark.slow
@pytest.mark.parametrize("chip", TARGETS)
def test_million_tokens_compile_forward(chip):
    # All 64 heads on one device: 64 GiB of operands and outputs, on chips that hold them.
    sizes = {"v5e": (131_072, 64), "v5p": (1_048_576, 64), "v6e": (262_144, 64), "tpu7x": (1_048_576, 64)}
    S, H = sizes[chip]

    def run(q, k, v, slopes, ids):
        # As a projection leaves them: heads side by side.
        q, k, v = (x.reshape(1, S, H, 128) for x in (q, k, v))
        o, _ = lightning_attention(q, k, v, slopes, segment_ids_BS=ids)
        return o.reshape(1, S, H * 128)

    q = jax.ShapeDtypeStruct((1, S, H * 128), jnp.bfloat16)
    compiled = compile_for_chip(CHIPS[chip], run, q, q, q, *shapes(1, S, H, 128, 128, "bfloat16")[3:5])
    # Nothing is copied into another layout on the way.
    assert compiled.memory_analysis().temp_size_in_bytes < q.size
    assert "lightning_attention_forward" in compiled.as_text()


@pytest.mark.parametrize("tokens", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_decode_compiles(tokens):
    for chip in TARGETS:
        compile_decode(chip, batch=8, tokens=tokens, heads=64)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v4", *TARGETS])
@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 1, "heads": 64, "key": 256, "value": 256},
        {"tokens": 8, "heads": 64, "key": 256, "value": 256, "dtype": "float32"},
        {"tokens": 2, "heads": 3, "key": 128, "value": 256},
        {"tokens": 8, "heads": 16, "dtype": "float32"},
    ],
    ids=str,
)
def test_other_decode_shapes_compile(chip, sizes):
    compile_decode(chip, batch=2, **sizes)


def compile_decode(chip, **sizes):
    function, shapes = tpu_cases.decode(**sizes)
    compiled = compile_for_chip(CHIPS[chip], function, *shapes)
    assert "lightning_attention_decode" in compiled.as_text()
    # The new state lies where the old one did.
    state = sizes["batch"] * sizes["heads"] * sizes.get("key", 128) * sizes.get("value", 128) * 4
    assert compiled.memory_analysis().alias_size_in_bytes == state
    assert compiled.memory_analysis().temp_size_in_bytes < state


def test_too_much_vmem_is_an_error():
    def copy(x_ref, y_ref, scratch_ref):
        scratch_ref[:8] = x_ref[...]
        y_ref[...] = scratch_ref[:8]

    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    kernel = pl.pallas_call(copy, out_shape=x, scratch_shapes=[pltpu.VMEM((2**20, 128), jnp.float32)])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)vmem"):
        compile_for_chip(CHIPS["v5e"], kernel, x)


@pytest.mark.parametrize(("names", "forward_passes"), [((), 2), ((LIGHTNING_STATES,), 1)])
def test_policy_that_keeps_states_spares_the_second_forward_pass(names, forward_passes):
    def loss(q):
        attend = lambda q: lightning_attention(q, q, q, jnp.ones(1))[0]  # noqa: E731
        return jnp.sum(jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(*names))(q) ** 2)

    compiled = compile_for_chip(CHIPS["v5e"], jax.grad(loss), jax.ShapeDtypeStruct((1, 512, 1, 128), jnp.bfloat16))
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert sum("lightning_attention_forward" in line.split(" = ")[0] for line in calls) == forward_passes
    assert len(calls) == forward_passes + 1


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("chip", TARGETS)
def test_static_cycles_have_not_grown(chip, kernel, write_golden):
    hold_kernel(chip, kernel, 128, write_golden)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_static_cycles_of_pairs_of_heads_have_not_grown(kernel, write_golden):
    hold_kernel("v5p", kernel, 64, write_golden)


def hold_kernel(chip, kernel, channels, write_golden):
    tokens, heads = 2048, 8
    q = jax.ShapeDtypeStruct((1, tokens, heads, channels), jnp.bfloat16)
    tiles = dict(zip(("forward", "backward"), choose_tiles(q, q, CHIPS[chip].device_kind), strict=True))[kernel]
    call = Call(kernel, tokens, heads, tiles, channels, channels)
    name = f"{chip} {kernel}" if channels == 128 else f"{chip} {kernel} {channels}"
    hold(name, lambda: call.predict(CHIPS[chip])[0] / call.token_heads, write_golden)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["fwd", "fused"])
@pytest.mark.parametrize("chip", TARGETS)
def test_static_cycles_of_softmax_attention_have_not_grown(chip, kernel, write_golden):
    # Of a row of 2,048 tokens that sees itself whole.
    call = softmax_figures.Call(kernel, Sizes(1024, 1024, 512), tokens=2048)
    hold(f"{chip} softmax {kernel}", lambda: call.cycles(CHIPS[chip]) / (2 * call.tokens), write_golden)


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("chip", TARGETS)
def test_static_cycles_of_decoding_have_not_grown(chip, tokens, write_golden):
    call = DecodeCall(tokens)

    def count():
        cycles = call.cycles(CHIPS[chip])
        # At least 90% of what the HBM allows.
        assert cycles / CHIPS[chip].clock <= CHIPS[chip].memory_seconds(call.bytes_moved) / 0.9
        return cycles / call.states

    hold(f"{chip} decode {tokens}", count, write_golden)


def hold(name, count, write_golden):
    """Holds a count of cycles against the golden file, or writes it there."""
    golden, version = json.loads(GOLDEN.read_text()), compiler_version()
    if not write_golden and version not in golden:
        pytest.skip(f"the golden file has no cycles of libtpu {version}; write them with --write-golden")
    if not write_golden and (version, name.split()[0]) in ABORTS:
        pytest.skip("this compiler's profiler cannot follow the kernel, and takes up to two minutes to say so")
    try:
        cycles = count()
    except ProfileError as error:
        if not write_golden:
            raise
        pytest.skip(f"this compiler's profiler cannot follow the kernel: {error}")
    if write_golden:
        golden.setdefault(version, {})[name] = round(cycles, 3)
        GOLDEN.write_text(json.dumps(golden, indent=2, sort_keys=True) + "\n")
        return
    assert cycles <= BOUND * golden[version][name]
