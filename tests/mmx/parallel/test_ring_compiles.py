"""The ring's island compiled for TPUs that are not here, forward and backward, at the released model's heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mmx.parallel.ring import ring_attention
from mmx.parallel.sequence_layout import SequenceLayout
from mmx.plan.topology import topology_devices
from tests.mmx.parallel.rows import AXIS, TOKENS

pytest.importorskip("libtpu")
GiB = 2**30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "length", "heads", "layout", "temporaries"),
    [
        ("v5p:2x2x1", 8192, (64, 8), "zigzag", 0.6),
        ("v5p:4x4x4", 2**20, (64, 8), "zigzag", 8.1),
        # Heads split over eight other devices, an eighth of the row on each rank.
        ("v5p:2x2x2", 2**20, (8, 1), "balanced", 4.2),
        ("tpu7x:2x2x1", 8192, (64, 8), "zigzag", 0.3),
    ],
)
def test_the_ring_compiles(topology, length, heads, layout, temporaries):
    layout, (H, G), K = SequenceLayout(layout), heads, 128
    mesh = Mesh(np.array(topology_devices(topology)), (AXIS,), axis_types=(AxisType.Explicit,))

    def local(q, k, v, do, segment_ids, slice_ids):
        slice_ids = slice_ids if layout.depends_on_documents else None
        attend = lambda q, k, v: ring_attention(q, k, v, segment_ids, axis=AXIS, layout=layout, slice_ids_BN=slice_ids)  # noqa: E731
        o, pullback = jax.vjp(attend, q, k, v)
        return o, pullback(do)

    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *shape), dtype, sharding=jax.NamedSharding(mesh, TOKENS))

    tokens = [of(length, heads, K) for heads in (H, G, G, H)]
    integers = of(length, dtype=jnp.int32), of(layout.slices_per_rank(mesh.size) * mesh.size, dtype=jnp.int32)
    island = jax.shard_map(local, mesh=mesh, in_specs=(TOKENS,) * 6, out_specs=TOKENS, check_vma=False)
    with jax.set_mesh(mesh):
        compiled = jax.jit(island).lower(*tokens, *integers).compile()
    text = compiled.as_text()
    for kernel in ("fwd_segmented_residuals", "dkv_segmented_no_residuals"):
        assert f"splash_mha_{kernel}" in text
    # A rank that holds few blocks of keys has all gradients of one kernel.
    assert ("splash_mha_dq_segmented_no_residuals" in text) == (length // mesh.size > 2**14)
    # Most are the forward pass's log-sum-exps, which the kernel writes 128 times, or the backward's shares of dq.
    assert compiled.memory_analysis().temp_size_in_bytes < temporaries * GiB
