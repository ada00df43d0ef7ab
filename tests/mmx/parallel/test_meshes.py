"""The same packed batch on meshes of 1, 2, 4 and 8 devices: same loss, same gradients, over five optimizer steps."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.config import MESH_AXES, MeshConfig, OptimizerConfig
from mmx.data.packing import ROW_DTYPES
from mmx.parallel import build_mesh
from mmx.parallel.sequence_layout import SequenceLayout
from mmx.train.loss import Batch
from mmx.train.optimizer import build_optimizer
from mmx.train.placement import BatchPlacement
from mmx.train.step import apply_gradient, init_state, token_sum_gradient
from tests.tiny import tiny, tokens

ROWS, LENGTH, STEPS = 8, 32, 5
# Adam divides by the root of the second moment: with a smaller eps it would make whole steps of gradients that are
# nothing but rounding.
OPTIMIZER = OptimizerConfig(eps=1e-6)
CONFIG = tiny(vocab_size=64, num_heads=8, num_kv_heads=4, num_experts=8, expert_hidden_size=24)

# Starts of documents in each row, and the padding behind the last one.
LAYOUTS = (
    ([0], 0),  # one over all ranks
    ([0, 16], 0),  # a boundary on an edge of every mesh
    ([0, 15, 17], 0),  # and beside one
    ([0, 1, 2, 3, 4, 5, 6, 7, 29], 0),  # shorter than any rank's share, and one over most of them
    ([0, 10, 11], 9),
    ([0, 31], 0),
    ([0, 4, 8, 12, 16, 20, 24, 28], 2),
    ([0, 9, 18, 27], 1),
)


def awkward_batch() -> Batch:
    """Documents of every relation to the ranks' edges."""
    ids = tokens(ROWS, LENGTH + 1, vocab_size=CONFIG.vocab_size)
    segments, positions = np.zeros((2, ROWS, LENGTH + 1), np.int32)
    for row, (starts, padding) in enumerate(LAYOUTS):
        ends = [*starts[1:], LENGTH + 1 - padding]
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            segments[row, start:end] = number + 1
            positions[row, start:end] = np.arange(end - start)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return Batch(
        ids[:, :-1], np.where(same, ids[:, 1:], 0), segments[:, :-1], positions[:, :-1], same.astype("float32")
    )


def placed(batch: Batch, layout: str) -> Batch:
    """The batch on the mesh in scope, as a run places it."""
    placement = BatchPlacement(jax.sharding.get_mesh(), SequenceLayout(layout), ROWS, LENGTH)
    return placement.to_devices(dict(zip(ROW_DTYPES, batch[: len(ROW_DTYPES)], strict=True)))


def train(config, sizes: MeshConfig | None):
    """Losses, gradients of every parameter, and drop rates of five steps; None is a device without a mesh."""
    optimizer = build_optimizer(OPTIMIZER)

    def step(state, batch):
        total = token_sum_gradient(config, 1, state.params, batch)
        state, metrics = apply_gradient(optimizer, 1.0, state, total, jnp.float32(1e-3))
        return state, (metrics.loss, metrics.stats.dropped, total.grads)

    with contextlib.ExitStack() as stack:
        batch = awkward_batch()
        if sizes is not None:
            count = int(np.prod([getattr(sizes, axis) for axis in MESH_AXES]))
            stack.enter_context(jax.set_mesh(build_mesh(sizes, jax.devices()[:count])))
            batch = placed(batch, config.sequence_layout)
        state = jax.jit(functools.partial(init_state, config, optimizer, 0))()
        # Larger than at initialisation, so that no part is too faint to matter.
        state = state._replace(params=jax.tree.map(lambda x: x if x.ndim == 3 else 2.5 * x, state.params))
        compiled, seen = jax.jit(step), []
        with jax.transfer_guard_device_to_host("disallow"):
            for _ in range(STEPS):
                state, outputs = compiled(state, batch)
                seen.append(outputs)
        return jax.device_get(seen)


@functools.cache
def alone(config):
    """The truth: one device without a mesh."""
    return train(config, None)


def assert_same(got, want):
    for step, ((loss, dropped, grads), (want_loss, want_dropped, want_grads)) in enumerate(zip(got, want, strict=True)):
        assert abs(loss / want_loss - 1) < 1e-5, f"step {step}"
        np.testing.assert_allclose(dropped, want_dropped, atol=1e-7, err_msg=f"step {step}")
        for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(want_grads), strict=True):
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            assert error < 1e-4, f"step {step}: {jax.tree_util.keystr(path)} differs by {error:.1e} of its norm"


slow = pytest.mark.slow
MESHES = {
    "one device": {},
    "replica 2": {"replica": 2},
    "fsdp 8": {"fsdp": 8},
    "expert 4": {"expert": 4},
    "expert_tensor 2": {"expert_tensor": 2},
    "context 8": {"context": 8},
    "context 4": {"context": 4},
    "tensor 4": {"tensor": 4},
    "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "expert 2, context 2, tensor 2": {"expert": 2, "context": 2, "tensor": 2},
    "replica 2, expert_tensor 2, context 2": {"replica": 2, "expert_tensor": 2, "context": 2},
    "expert_tensor 2, context 2, tensor 2": {"expert_tensor": 2, "context": 2, "tensor": 2},
    "replica 2, fsdp 2, expert_tensor 2": {"replica": 2, "fsdp": 2, "expert_tensor": 2},
    "context 4, tensor 2": {"context": 4, "tensor": 2},
}
# In the fast suite: every axis alone or in a mix of three.
FAST = {"fsdp 2, expert 2, tensor 2", "expert_tensor 2, context 2, tensor 2", "context 8"}


@pytest.mark.parametrize("mesh", [mesh if mesh in FAST else pytest.param(mesh, marks=slow) for mesh in MESHES])
def test_same_numbers(mesh):
    assert_same(train(CONFIG, MeshConfig(**MESHES[mesh])), alone(CONFIG))


# Everything else that changes how the work is spread and must not change the numbers.
SPREADS = {
    "padded": ({"expert_exchange": "padded"}, {"expert": 2, "expert_tensor": 2, "tensor": 2}),
    "ragged, two groups": (
        {"expert_exchange": "ragged", "exchange_groups": 2},
        {"expert": 2, "expert_tensor": 2, "context": 2},
    ),
    "ragged, one expert a device": ({"expert_exchange": "ragged"}, {"expert": 8}),
    "contiguous slices": ({"sequence_layout": "contiguous"}, {"context": 4, "tensor": 2}),
    "balanced slices": ({"sequence_layout": "balanced"}, {"fsdp": 2, "context": 2, "tensor": 2}),
    "selective rematerialisation": ({"remat": "selective"}, {"context": 2, "tensor": 2}),
    "results offloaded to the host": ({"remat": "offload"}, {"context": 2, "tensor": 2}),
    "full rematerialisation": ({"remat": "full"}, {"fsdp": 2, "expert": 2, "context": 2}),
    "tied embeddings": ({"tie_embeddings": True}, {"fsdp": 2, "tensor": 4}),
}


@pytest.mark.parametrize(
    "spread", [pytest.param(name, marks=() if name == "ragged, two groups" else slow) for name in SPREADS]
)
def test_same_numbers_however_spread(spread):
    changes, sizes = SPREADS[spread]
    changed = dataclasses.replace(CONFIG, **changes)
    assert_same(train(changed, MeshConfig(**sizes)), alone(changed if "tie_embeddings" in changes else CONFIG))


@pytest.mark.parametrize(
    ("body", "sizes", "layout"),
    [
        ("padded", {"fsdp": 2, "expert": 2, "context": 2}, "zigzag"),
        pytest.param("ragged", {"expert": 4, "expert_tensor": 2}, "zigzag", marks=slow),
        pytest.param("gather", {"expert": 2, "context": 2, "tensor": 2}, "balanced", marks=slow),
    ],
)
def test_global_router_drops_the_same_on_any_mesh(body, sizes, layout):
    config = dataclasses.replace(CONFIG, capacity_factor=1.0, global_router=True)
    want = alone(config)
    assert max(step[1].max() for step in want) > 0.02
    spread = dataclasses.replace(config, expert_exchange=body, sequence_layout=layout)
    assert_same(train(spread, MeshConfig(**sizes)), want)
