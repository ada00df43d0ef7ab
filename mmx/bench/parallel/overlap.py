"""The exchange of tokens in groups: how much of it a compiled TPU program runs beside the experts' products.

Time on a CPU says nothing about it, so the schedule is read instead. Needs libtpu, but no TPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mmx.config import ConfigError, MeshConfig, ModelConfig
from mmx.model.experts import Experts
from mmx.parallel import build_mesh, spec
from mmx.parallel.compiler import compiler_options
from mmx.plan.collectives import Collective, collectives
from mmx.plan.topology import topology_devices

TOPOLOGY, GROUPS = "v5p:2x2x2", (1, 2, 4)
ROWS, LENGTH = 8, 4096
CONFIG = ModelConfig(
    hidden_size=1024,
    num_experts=8,
    expert_hidden_size=2048,
    capacity_factor=1.25,
    expert_exchange="padded",
    dtype="bfloat16",
)
MESH = MeshConfig(expert=8)


def measure(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A layer of experts, forward and backward, with each number of groups, as a run compiles it and by default."""
    try:
        mesh = build_mesh(MESH, topology_devices(TOPOLOGY))
    except ConfigError as error:
        say(str(error))
        return [{"failed": str(error)}]
    say(f"one layer of {CONFIG.num_experts} experts over {TOPOLOGY}, {LENGTH:,} tokens a device, forward and backward")
    results = []
    with jax.set_mesh(mesh):
        for groups in GROUPS:
            for what, options in (("as a run compiles it", compiler_options()), ("compiler's defaults", {})):
                found = [c for c in _exchanges(groups, options) if c.kind == "all-to-all"]
                overlapped = [c for c in found if c.overlapped]
                say(
                    f"{groups} groups, {what}: {len(found)} exchanges, {sum(c.is_async for c in found)} of them "
                    f"asynchronous, {len(overlapped)} with products of another group meanwhile "
                    f"({sum(c.overlapped for c in overlapped)} products)"
                )
                results.append(
                    {
                        "groups": groups,
                        "options": dict(options),
                        "exchanges": len(found),
                        "asynchronous": sum(c.is_async for c in found),
                        "overlapped": len(overlapped),
                    }
                )
    return results


def _exchanges(groups: int, options: Mapping[str, str]) -> list[Collective]:
    config = dataclasses.replace(CONFIG, exchange_groups=groups)
    mesh = jax.sharding.get_mesh()

    def placed(x: jax.ShapeDtypeStruct, sharding_spec: jax.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, sharding_spec))

    experts = jax.eval_shape(lambda: Experts(config, jax.random.key(0)))
    experts = jax.tree.map(lambda x: placed(x, x.sharding.spec), experts)
    x_BSD = placed(
        jax.ShapeDtypeStruct((ROWS, LENGTH, config.hidden_size), jnp.bfloat16), spec("batch", "sequence", None)
    )

    def loss(experts, x_BSD):
        return jnp.sum(jnp.square(experts(x_BSD, None, dropless=False)[0].astype(jnp.float32)))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(experts, x_BSD).compile(compiler_options=dict(options))
    return collectives(compiled.as_text())
