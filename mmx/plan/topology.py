"""Compiling for a named TPU topology without having it: the installed libtpu compiles on any CPU machine."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from mmx.config import ConfigError, Run
from mmx.parallel import spec
from mmx.parallel.compiler import compiler_options
from mmx.train.loss import Batch
from mmx.train.optimizer import build_optimizer
from mmx.train.step import abstract_state, train_step
from pallas_kernels.aot.compile import COMPILER_ENVIRONMENT, missing_compiler


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a topology, which can be compiled for but not run on.

    Args:
      name: of one slice, as libtpu spells it, for example "v5p:2x2x2" or "v6e:16x16".
      slices: how many of them, joined over a slow network.

    Raises:
      ConfigError: if libtpu is not installed or does not know the topology.
    """
    if reason := missing_compiler():
        raise ConfigError(f"cannot compile for {name!r}: {reason}")
    for variable, value in COMPILER_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **several)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot compile for {name!r} ({reason}): write the topology like v5p:2x2x2, v5e:4x4, v6e:4x4 or "
            "tpu7x:2x2x1"
        ) from None
    return list(topology.devices)


def compile_train_step(run: Run, mesh: Mesh, options: Mapping[str, str] | None = None) -> jax.stages.Compiled:
    """The training step of a run, compiled for a mesh of devices that need not exist; state and batch by shape only.

    Args:
      options: compiler options; None takes the ones a run has.
    """
    with jax.set_mesh(mesh):
        optimizer = build_optimizer(run.optimizer)
        step = functools.partial(train_step, run.model, optimizer, run.optimizer.clip_norm, run.train.micro_batches)
        sharding = NamedSharding(mesh, spec("batch", "attention_sequence"))
        shape = (run.data.batch_size, run.data.sequence_length)
        whole = functools.partial(jax.ShapeDtypeStruct, shape, sharding=sharding)
        batch = Batch(*[whole(jnp.int32)] * 4, whole(jnp.float32))
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, jax.P()))
        lowered = jax.jit(step, donate_argnums=0).lower(abstract_state(run.model, optimizer), batch, rate)
        return lowered.compile(compiler_options=dict(compiler_options() if options is None else options))
