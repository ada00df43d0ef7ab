"""The kernels inside the jitted, sharded train step, compiled for TPU topologies that are not there."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from configs.text_1b import get_config
from mmx.config import MeshConfig
from mmx.parallel import build_mesh, spec
from mmx.train.loss import Batch
from mmx.train.optimizer import build_optimizer
from mmx.train.step import abstract_state, train_step
from pallas_kernels.aot import missing_compiler
from pallas_kernels.aot.compile import COMPILER_ENVIRONMENT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
]


def test_step_of_the_billion_model_runs_the_kernels():
    for variable, value in COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    run = get_config()
    optimizer = build_optimizer(run.optimizer)
    mesh = build_mesh(MeshConfig(fsdp=4), list(devices))
    with jax.set_mesh(mesh):
        tokens = NamedSharding(mesh, spec("batch", "attention_sequence"))
        batch = Batch(
            *(jax.ShapeDtypeStruct((4, 8192), dtype, sharding=tokens) for dtype in [jnp.int32] * 4 + [jnp.float32])
        )
        step = functools.partial(train_step, run.model, optimizer, run.optimizer.clip_norm, 1)
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, jax.P()))
        state = abstract_state(run.model, optimizer)
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch, rate).compile()
    kernels = [line.split(" = ")[0] for line in compiled.as_text().splitlines() if '"tpu_custom_call"' in line]
    count = lambda name: sum(name in kernel for kernel in kernels)  # noqa: E731
    # One call each in the scanned body; full rematerialisation runs the forward kernel again.
    assert count("lightning_attention_backward") == 1
    assert count("lightning_attention_forward") == 2
    # Softmax layers take splash attention's kernels.
    assert count("splash_mha_fwd") == 2
    assert count("splash_mha_dq") == count("splash_mha_dkv") == 1
