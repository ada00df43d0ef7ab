"""Compiling for a named TPU topology without having it: the installed libtpu compiles on any CPU machine."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from mmx.config import ConfigError, Run
from mmx.generate.engine import prefill_and_step
from mmx.model.text import init_params
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


def compile_prefill(run: Run, mesh: Mesh) -> tuple[jax.stages.Compiled, Any, Any]:
    """The pass over ``data.batch_size`` prompts of ``data.sequence_length`` tokens that fills the cache, compiled.

    Returns:
      The program, and by shape the parameters that it takes and the cache that it leaves.
    """
    with jax.set_mesh(mesh):
        prefill, _, params, padding = _generation(run, mesh)
        shape = run.data.batch_size, run.data.sequence_length
        tokens = _whole(mesh, shape, jnp.int32, "batch", "attention_sequence")
        lowered = prefill.lower(params, tokens, padding, shape[1])
        cache = jax.tree.map(functools.partial(_placed, mesh), lowered.out_info[1])
        return lowered.compile(compiler_options=compiler_options()), params, cache


def compile_decode(run: Run, mesh: Mesh) -> tuple[jax.stages.Compiled, Any, Any]:
    """One more token of ``data.batch_size`` rows whose cache has room for ``data.sequence_length``, compiled.

    Returns:
      The program, and by shape the parameters and the cache that it takes.
    """
    with jax.set_mesh(mesh):
        prefill, step, params, padding = _generation(run, mesh)
        shape = run.data.batch_size, run.data.sequence_length
        tokens = _whole(mesh, shape, jnp.int32, "batch", "attention_sequence")
        _, cache = jax.eval_shape(functools.partial(prefill, slots=shape[1]), params, tokens, padding)
        cache = jax.tree.map(functools.partial(_placed, mesh), cache)
        slot = _whole(mesh, (), jnp.int32)
        lowered = step.lower(params, _whole(mesh, shape[:1], jnp.int32, "batch"), cache, slot, padding)
        return lowered.compile(compiler_options=compiler_options()), params, cache


def _generation(run: Run, mesh: Mesh) -> tuple[Any, Any, Any, jax.ShapeDtypeStruct]:
    """The jitted functions, the parameters and the rows' padding, by shape."""
    prefill, step = prefill_and_step(dataclasses.replace(run.model))
    params = jax.eval_shape(lambda: init_params(run.model, jax.random.key(0)))
    params = jax.tree.map(functools.partial(_placed, mesh), params)
    return prefill, step, params, _whole(mesh, (run.data.batch_size,), jnp.int32, "batch")


def _whole(mesh: Mesh, shape: tuple[int, ...], dtype: jnp.dtype, *axes: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*axes)))


def _placed(mesh: Mesh, x: Any) -> jax.ShapeDtypeStruct:
    """A shape with its sharding on the devices of a mesh, from the one in its type."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))


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
        chosen = compiler_options(run.train.micro_batches) if options is None else options
        return lowered.compile(compiler_options=dict(chosen))
