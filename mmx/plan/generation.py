"""The plan of a prefill or of a decoding step on a TPU slice."""

from __future__ import annotations

from collections.abc import Callable

from mmx.config import LIGHTNING, ConfigError, Run, count_parameters, forward_flops
from mmx.plan.machine import Machine
from mmx.plan.memory import Memory, generation_memory, parameter_bytes
from mmx.plan.report import Plan, compiled_on
from mmx.plan.topology import compile_decode, compile_prefill

WORKS = {"prefill": compile_prefill, "decode": compile_decode}


def generation_plan(run: Run, machine: Machine, work: str, say: Callable[[str], None] = lambda line: None) -> Plan:
    """Compiles a prefill of ``data.batch_size`` prompts of ``data.sequence_length`` tokens, or one token after them.

    Raises:
      ConfigError: as ``compiled_plan`` does, for GPUs, and for rows split over ``context``, which leave no cache.
    """
    if not machine.is_tpu:
        raise ConfigError(f"--work={work} is compiled and {machine.name} cannot be: give a TPU slice such as v5p:4x4x4")
    if run.mesh.sizes(machine.devices)["context"] > 1:
        raise ConfigError(f"--work={work} needs whole rows on a device: set mesh.context=1, and split mesh.tensor")
    run.validate(machine.devices)
    tokens = run.data.batch_size * (run.data.sequence_length if work == "prefill" else 1)
    memory = _counted_memory(run, machine)
    flops = _flops(run, work)
    touched = memory.parameters + memory.cache
    seconds = max(flops / machine.devices / machine.part.flops, touched / machine.part.bandwidth)
    plan = Plan(
        machine=machine,
        run=run,
        mesh=run.mesh.sizes(machine.devices),
        parameters=count_parameters(run.model).total,
        tokens=tokens,
        model_flops=flops,
        memory_available=machine.part.memory,
        memory_counted=memory,
        counted_seconds=seconds,
        counted={},
        work=work,
    )

    def build(mesh):
        compiled, params, cache = WORKS[work](run, mesh)
        return compiled, lambda program: generation_memory(compiled, params, cache)

    return compiled_on(plan, build, say)


def _counted_memory(run: Run, machine: Machine) -> Memory:
    model, sizes = run.model, run.mesh.sizes(machine.devices)
    width = {"float32": 4, "bfloat16": 2}
    lightning = sum(kind == LIGHTNING for kind in model.layer_pattern)
    rows = run.data.batch_size / (machine.devices / sizes["tensor"])
    states = lightning * model.num_heads * model.head_dim**2 * 4
    keys = (model.num_layers - lightning) * 2 * model.num_kv_heads * model.head_dim * width[model.dtype]
    cache = rows / sizes["tensor"] * (states + keys * run.data.sequence_length)
    return Memory(parameter_bytes(model, sizes), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, cache=cache)


def _flops(run: Run, work: str) -> float:
    """Of all devices; a prefill needs the last token's logits alone."""
    length, rows = run.data.sequence_length, run.data.batch_size
    whole = forward_flops(run.model, [length])
    if work == "prefill":
        return rows * (whole.total - whole.head * (length - 1) / length)
    return rows * (whole.total - forward_flops(run.model, [length - 1]).total)
