"""Meshes of devices that are here, of TPU slices that are not, and the table from logical to mesh axes."""

import jax
import pytest

from mmx.config import MESH_AXES, ConfigError, MeshConfig
from mmx.parallel import abstract_mesh, build_mesh, spec
from mmx.parallel.axes import parameter_spec
from mmx.plan.topology import topology_devices


def test_every_axis_is_named_and_explicit():
    mesh = build_mesh(MeshConfig(fsdp=2, context=-1))
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {**dict.fromkeys(MESH_AXES, 1), "fsdp": 2, "context": 4}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    abstract = abstract_mesh(MeshConfig(fsdp=2, context=-1), 8)
    assert (abstract.shape, abstract.axis_types) == (mesh.shape, mesh.axis_types)


def test_axes_need_not_follow_the_torus():
    pytest.importorskip("libtpu")
    mesh = build_mesh(MeshConfig(fsdp=16, expert=2, tensor=2), topology_devices("v5p:4x4x4"))
    assert mesh.shape["fsdp"] == 16


def test_replica_alone_goes_across_slices():
    pytest.importorskip("libtpu")
    devices = topology_devices("v5p:2x2x1", slices=2)
    mesh = build_mesh(MeshConfig(replica=2, fsdp=4), devices)
    slices = [[device.slice_index for device in part.flat] for part in mesh.devices]
    assert slices == [[0] * 4, [1] * 4]
    with pytest.raises(ConfigError, match=r"mesh.replica=1 does not span the 2 slices.*multiple of 2"):
        build_mesh(MeshConfig(fsdp=8), devices)


def test_two_dimensions_cannot_share_a_mesh_axis():
    with pytest.raises(ValueError, match="'heads' and 'vocab' are both split over mesh axis 'tensor'"):
        spec("heads", "vocab")
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        spec("head")


def test_parameters_at_rest_are_split_over_all_that_would_hold_copies():
    assert parameter_spec(("hidden", "heads", None), 4) == spec(None, "stored_hidden", "heads", None)
    assert parameter_spec(("experts", "expert_hidden", "hidden"), 5) == spec(
        None, None, "experts", "expert_hidden", "stored_expert_hidden"
    )
