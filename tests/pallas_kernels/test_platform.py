"""The platform that code is traced for comes from the mesh, or from the caller, before the host."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.platform import compile_for, target_platform


def test_default_is_the_host():
    assert target_platform() == "cpu"


def test_caller_decides():
    with compile_for("tpu"):
        assert target_platform() == "tpu"
        with compile_for("cuda"):
            assert target_platform() == "gpu"
        assert target_platform() == "tpu"
    assert target_platform() == "cpu"
    with pytest.raises(ValueError, match="not one of"), compile_for("abacus"):
        pass


def test_mesh_decides_inside_jit():
    device = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Explicit,), abstract_device=device)
    seen = []

    def function(x):
        seen.append(target_platform())
        return x

    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(function, 1.0)
    assert seen == ["tpu"]
