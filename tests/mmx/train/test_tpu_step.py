"""The kernels inside the jitted, sharded train step, compiled for TPU topologies that are not there."""

import pytest

from configs.text_1b import get_config
from mmx.parallel import build_mesh
from mmx.plan.topology import compile_train_step, topology_devices
from pallas_kernels.aot import missing_compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
]


def test_step_of_the_billion_model_runs_the_kernels():
    run = get_config()
    run.mesh.fsdp, run.data.batch_size, run.train.micro_batches = 4, 4, 1
    compiled = compile_train_step(run, build_mesh(run.mesh, topology_devices("v5p:2x2x1")))
    kernels = [line.split(" = ")[0] for line in compiled.as_text().splitlines() if '"tpu_custom_call"' in line]
    count = lambda name: sum(name in kernel for kernel in kernels)  # noqa: E731
    # One call each in the scanned body; full rematerialisation runs the forward kernel again.
    assert count("lightning_attention_backward") == 1
    assert count("lightning_attention_forward") == 2
    # Softmax layers take splash attention's kernels, one of them for all gradients.
    assert count("splash_mha_fwd") == 2
    assert (count("splash_mha_dq"), count("splash_mha_dkv")) == (0, 1)
