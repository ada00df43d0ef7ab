"""What a training step sends between devices, read from the program compiled for a TPU and counted on paper.

The counts on paper are those of BUILD_NOTES.md, "What travels". Shapes: B rows and S tokens of a device, H heads,
G key-value heads, K head channels, D hidden, F expert hidden, V vocabulary, E experts, N experts of a device.
"""

import functools
import math

import pytest

from mmx.config import HYBRID_PERIOD, DataConfig, MeshConfig, ModelConfig, Run
from mmx.parallel import build_mesh
from mmx.plan.collectives import collectives
from mmx.plan.topology import compile_train_step, topology_devices

pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu")

D, F, H, G, K, V, E = 256, 256, 4, 2, 128, 512, 8
LIGHTNING, SOFTMAX, LAYERS = 14, 2, 16
ROWS, GROUPS, FACTOR, CHOICES = 8, 4, 1.25, 2
WAYS = {"fsdp": 2, "context": 2, "expert": 2}
B, N = ROWS // 4, E // 2
BF16, FP32 = 2, 4


@functools.cache
def sent(length: int):
    """The collectives of a step with rows of ``length`` tokens, without the few bytes of metrics and counts."""
    run = Run(
        model=ModelConfig(
            vocab_size=V,
            hidden_size=D,
            num_layers=LAYERS,
            layer_pattern=HYBRID_PERIOD * 2,
            num_heads=H,
            num_kv_heads=G,
            head_dim=K,
            rotary_dim=64,
            num_experts=E,
            expert_hidden_size=F,
            capacity_factor=FACTOR,
            exchange_groups=GROUPS,
            dtype="bfloat16",
            remat="selective",
        ),
        mesh=MeshConfig(**WAYS),
        data=DataConfig(sequence_length=length, batch_size=ROWS),
    )
    run.validate(8)
    program = compile_train_step(run, build_mesh(run.mesh, topology_devices("v5p:2x2x2"))).as_text()
    return [c for c in collectives(program) if c.size > 4096]


def states(length: int):
    """The gathers of lightning attention's states."""
    is_states = lambda c: c.kind == "all-gather" and c.result.startswith("f32[") and f"{K},{K}" in c.result  # noqa: E731
    return [c for c in sent(length) if is_states(c)]


@pytest.mark.slow
def test_lasp_sends_states_once_each_way_whatever_the_length():
    ranks, slices = WAYS["context"], 2
    for length in (512, 1024):
        assert {c.size for c in states(length)} == {ranks * slices * B * H * K * K * FP32}
        assert sum(c.times for c in states(length)) == 2 * LIGHTNING


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 1024])
def test_ring_moves_key_value_heads_alone(length):
    ranks = WAYS["context"]
    hops = [c for c in sent(length) if c.kind == "collective-permute"]
    assert {c.size for c in hops} <= {B * length // ranks * G * K * width for width in (BF16, FP32)}
    # Keys and values forward and again backward, their gradients backward and home.
    assert sum(c.times for c in hops) == SOFTMAX * (2 * (ranks - 1) * 2 + 2 * ranks)
    assert all(c.is_async for c in hops)
    # Keys and values of the next step travel while this step's blocks are multiplied.
    assert sum(c.times for c in hops if c.overlapped) >= SOFTMAX * 2 * (ranks - 1) * 2


@pytest.mark.slow
def test_fsdp_gathers_each_weight_once_a_pass():
    attention = LIGHTNING * 5 * D * H * K + SOFTMAX * (2 * D * H * K + 2 * D * G * K)
    experts = LAYERS * N * 3 * D * F
    router = LAYERS * D * E * FP32
    gathered = [c for c in sent(512) if c.kind == "all-gather" and c not in states(512)]
    # The layers' weights forward and backward; both tables once, the head being used up in the forward pass.
    want = 2 * ((attention + experts) * BF16 + router) + 2 * V * D * BF16
    assert sum(c.times * c.size for c in gathered) == want


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 1024])
def test_exchange_sends_each_token_to_its_experts_and_back(length):
    tokens = B * length // WAYS["context"] // GROUPS
    bucket = math.ceil(FACTOR * tokens * CHOICES / E)
    exchanges = [c for c in sent(length) if c.kind == "all-to-all"]
    assert {c.size for c in exchanges} == {E * bucket * D * BF16}
    # There and back: forward, once more when the layer is recomputed, and for the gradients.
    assert sum(c.times for c in exchanges) == LAYERS * GROUPS * 2 * 3
    assert all(c.is_async for c in exchanges)


@pytest.mark.slow
def test_exchange_overlaps_the_experts_of_another_group():
    assert sum(c.times for c in sent(1024) if c.kind == "all-to-all" and c.overlapped) >= LAYERS
