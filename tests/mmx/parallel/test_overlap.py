"""Compiled for a TPU, without one: what travels around the ring does so while a step is computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from mmx.parallel.ring import ring_attention
from mmx.parallel.sequence_layout import SequenceLayout
from mmx.plan.topology import topology_devices
from pallas_kernels.platform import compile_for
from tests.mmx.parallel.rows import AXIS, TOKENS

pytest.importorskip("libtpu")


@pytest.fixture(scope="module")
def mesh():
    # The suite's cache of compiled programs cannot read this one back.
    jax.config.update("jax_enable_compilation_cache", False)
    yield Mesh(np.array(topology_devices("v5p:2x2x1")), (AXIS,), axis_types=(AxisType.Explicit,))
    jax.config.update("jax_enable_compilation_cache", True)


def computations(hlo):
    """The instructions of each computation of a scheduled program, in order."""
    return [body.splitlines() for body in re.split(r"\n\n", hlo) if "{" in body]


def spans(instructions):
    """For each asynchronous permutation of floats: whether a step of attention runs between its start and its end."""
    found = {}
    for place, line in enumerate(instructions):
        if match := re.search(r"%(\S+) = \((?:bf16|f32).* collective-permute-start\(", line):
            started, name = place, match[1]
            ended = next(n for n, later in enumerate(instructions) if f"collective-permute-done(%{name})" in later)
            between = instructions[started:ended]
            found[name] = any(re.search(r" (conditional|while)\(", other) for other in between)
    return found


def test_the_ring_travels_while_attention_computes(mesh):
    H, G, K, S = 4, 1, 128, 8192
    layout = SequenceLayout("zigzag")

    def local(q, k, v, do, segment_ids):
        attend = lambda q, k, v: ring_attention(q, k, v, segment_ids, axis=AXIS, layout=layout)  # noqa: E731
        return jax.vjp(attend, q, k, v)[1](do)

    gradients = jax.shard_map(local, mesh=mesh, in_specs=(TOKENS,) * 5, out_specs=(TOKENS,) * 3, check_vma=False)
    sharding = jax.NamedSharding(mesh, TOKENS)
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, S, *shape), dtype, sharding=sharding)  # noqa: E731
    arguments = of(H, K), of(G, K), of(G, K), of(H, K), of(dtype=jnp.int32)
    with compile_for("tpu"):
        compiled = jax.jit(gradients).lower(*arguments).compile()

    hlo = compiled.as_text()
    assert all(f"splash_mha_{kernel}_segmented" in hlo for kernel in ("fwd", "dkv"))
    assert not re.search(r" collective-permute\(", hlo), "all of them are asynchronous"
    found = {name: value for part in computations(hlo) for name, value in spans(part).items()}
    # Keys and values in the forward loop and in the backward one; their gradients in the loop and before the last step.
    # On their way home these are alone, and so are keys and values on the first hop, which both passes share here: the
    # compiler does not know that the kernel beside them takes long.
    assert sorted(found.values()) == [False] * 4 + [True] * 2 * (1 + 1 + 2)
