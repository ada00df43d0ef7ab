"""What a device's memory holds in a training step: read from the compiled program, and counted on paper.

From the program: what the step is called with is exact. Of its temporaries, what the scan over layers leaves for the
backward pass, what it gathers of gradients, and copies of the whole parameters are arrays that its loops carry; the
rest is the work of one layer and the head. The compiler's sum of temporaries counts some places more than once, so that
the total is an upper bound: a step whose sum is 103 GiB, 73 of them alive at once, compiles for a device of 95.7.

On paper: the same, without tiles and without the compiler's own copies.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from mmx.config import LIGHTNING, ModelConfig, Run
from mmx.model.text import init_params, parameter_specs
from mmx.plan.hlo import Array, Instruction, Program, arrays, project_path
from mmx.train.optimizer import build_optimizer
from mmx.train.step import TrainState, abstract_state

GiB = 2**30
_NOT_MADE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant")


@dataclasses.dataclass
class Memory:
    """Bytes of one device."""

    parameters: float
    optimizer: float
    batch: float
    saved_activations: float
    gradients: float
    parameter_copies: float  # casts of all parameters at once
    working: float  # everything else
    cache: float = 0.0  # of generation: states, keys and values
    host: float = 0.0  # in the host's memory, for one device

    @property
    def total(self) -> float:
        """In the device's memory."""
        return sum(dataclasses.asdict(self).values()) - self.host


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One large array of a program."""

    size: int  # bytes in memory
    padding: int  # bytes of it that are no numbers
    type: str
    where: str  # file and line of our code, and the operation


def compiled_memory(compiled: jax.stages.Compiled, program: Program, state: TrainState) -> Memory:
    """What the compiler lays out.

    Args:
      state: that the step was compiled with, by shape.
    """
    stats = compiled.memory_analysis()
    saved, gradients, copies = (sum(a.padded_size for a in found) for found in carried(program))
    held, optimizer = device_bytes(state.params), device_bytes(state.optimizer)
    temporaries = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Memory(
        parameters=held,
        optimizer=optimizer,
        batch=stats.argument_size_in_bytes - held - optimizer,
        saved_activations=saved,
        gradients=gradients,
        parameter_copies=copies,
        working=temporaries + stats.generated_code_size_in_bytes - saved - gradients - copies,
        host=stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
    )


def generation_memory(compiled: jax.stages.Compiled, params: Any, cache: Any) -> Memory:
    """What the compiler lays out for a prefill or a decoding step, from what it takes or leaves by shape."""
    stats = compiled.memory_analysis()
    held, kept = device_bytes(params), device_bytes(cache)
    everything = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporaries = stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    return Memory(held, 0.0, max(0.0, everything - held - kept), 0.0, 0.0, 0.0, temporaries, cache=kept)


def carried(program: Program) -> tuple[list[Array], list[Array], list[Array]]:
    """Arrays that the loops over layers carry in HBM as a whole: saved activations, gradients, copies of parameters."""
    saved, gradients, copies = [], [], []
    for loop in _loops_over_layers(program, program.entry):
        turns = program.turns(loop)
        body = program.body(loop.called("body")[0])
        root = next(i for i in body if i.is_root)
        names = {i.name: i for i in body}
        for place, (operand, array) in enumerate(zip(root.operands, _elements(loop.result), strict=False)):
            if array is None or not array.in_hbm or not array.shape or array.shape[0] != turns or len(array.shape) < 3:
                continue
            source = names.get(operand)
            passes_through = (
                source is not None and source.operation == "get-tuple-element" and f"index={place}" in source.rest
            )
            backward = "transpose(" in loop.jax_name
            if not passes_through:
                (gradients if backward else saved).append(array)
            elif not backward and array.dtype == "bf16":
                copies.append(array)
    return saved, gradients, copies


def largest_buffers(program: Program, count: int) -> list[Buffer]:
    """The largest arrays that instructions make, one of each type and place."""
    found: dict[tuple[str, str], Buffer] = {}
    wrapped = {name for body in program.computations.values() for i in body for name in i.called("calls")}
    for name, body in program.computations.items():
        if name in wrapped:
            continue
        for instruction in body:
            if instruction.operation in _NOT_MADE or instruction.operation.endswith("-done"):
                continue
            for array in arrays(instruction.result):
                if array.in_hbm:
                    kind = f"{array.dtype}[{','.join(map(str, array.shape))}]"
                    where = _place(program, instruction)
                    buffer = Buffer(array.padded_size, array.padded_size - array.size, kind, where)
                    found.setdefault((kind, where), buffer)
    return sorted(found.values(), key=lambda b: -b.size)[:count]


def analytic_memory(run: Run, num_devices: int) -> Memory:
    """The same on paper."""
    model, sizes = run.model, run.mesh.sizes(num_devices)
    width = {"float32": 4, "bfloat16": 2}[model.dtype]
    tokens = run.data.batch_size * run.data.sequence_length / num_devices / run.train.micro_batches
    attention_tokens = tokens * sizes["tensor"]
    D, H, K = model.hidden_size, model.num_heads / sizes["tensor"], model.head_dim
    lightning = sum(kind == LIGHTNING for kind in model.layer_pattern)
    softmax = model.num_layers - lightning

    inputs = model.num_layers * tokens * D * width
    results = model.num_layers * attention_tokens * H * K * width + softmax * attention_tokens * H * 4
    saved, host = inputs, 0.0
    if model.remat == "selective":
        saved += results
    elif model.remat == "offload":
        host += results
    elif model.remat == "none":
        hidden = model.experts_per_token * max(1.0, model.capacity_factor) * 3 * model.expert_hidden_size
        per_layer = tokens * (6 * D + hidden / sizes["expert_tensor"]) + attention_tokens * 6 * H * K
        saved += model.num_layers * per_layer * width
    parameters = parameter_bytes(model, sizes)
    gradients = parameters * (2 if run.train.micro_batches > 1 else 1)

    # One layer's weights, gathered, and their gradients before they are scattered.
    local_experts = model.num_experts / sizes["expert"]
    experts = local_experts * 3 * D * model.expert_hidden_size / sizes["expert_tensor"]
    attention = 5 * D * H * K
    layer_weights = 2 * (experts + attention) * width
    # Forward again and backward: queries, keys, values, gate and output with their gradients; rows of one group sent
    # and received, and what the experts make of them.
    rows = tokens / model.exchange_groups * model.experts_per_token * max(1.0, model.capacity_factor)
    group = rows * (4 * D + 3 * 2 * model.expert_hidden_size / sizes["expert_tensor"]) * width
    layer = attention_tokens * 10 * H * K * width + 8 * tokens * D * width + group
    head = model.vocab_size / sizes["tensor"] * D * (2 * width + 4)
    period = model.num_layers // _periods(model.layer_pattern)
    return Memory(
        parameters=parameters,
        optimizer=2 * parameters,
        batch=5 * 4 * attention_tokens * run.train.micro_batches,
        saved_activations=saved,
        gradients=gradients,
        parameter_copies=0.0,
        working=max(head, layer_weights + layer + period * tokens * D * width),
        host=host,
    )


def parameter_bytes(model: ModelConfig, ways: dict[str, int]) -> float:
    """Bytes of one device's part of the parameters on a mesh of these axes."""

    def part(shape: jax.ShapeDtypeStruct, spec: jax.P) -> float:
        axes = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
        return math.prod(shape.shape) * shape.dtype.itemsize / math.prod(ways[axis] for axis in axes)

    shapes, specs = _shapes_and_specs(dataclasses.replace(model))
    return sum(map(part, shapes, specs))


@functools.cache
def _shapes_and_specs(model: ModelConfig) -> tuple[list[jax.ShapeDtypeStruct], list[jax.P]]:
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    specs = jax.tree.leaves(parameter_specs(model), is_leaf=lambda x: isinstance(x, jax.P))
    return jax.tree.leaves(shapes), specs


def device_bytes(shapes: Any) -> float:
    """Bytes of one device's part of a tree of ``jax.ShapeDtypeStruct``; one without a sharding lies on every device."""
    local = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # noqa: E731
    return float(sum(math.prod(local(x)) * x.dtype.itemsize for x in jax.tree.leaves(shapes)))


def state_on(run: Run, mesh: Mesh) -> TrainState:
    """The state of a run by shape, laid out on a mesh."""
    with jax.set_mesh(mesh):
        return abstract_state(run.model, build_optimizer(run.optimizer))


def _loops_over_layers(program: Program, computation: str) -> Iterator[Instruction]:
    """Loops whose bodies hold loops or layers: outermost first, within a loop over micro-batches too."""
    for instruction in program.body(computation):
        if instruction.operation != "while" or not program.turns(instruction):
            continue
        if any("model/text.py" in file for file, _ in program.source(instruction)[:1]):
            yield instruction
        elif "jvp" not in instruction.jax_name:
            yield from _loops_over_layers(program, instruction.called("body")[0])


def _elements(result: str) -> list[Array | None]:
    """Arrays of a tuple type by place; None for what is no array."""
    found, depth, piece = [], 0, ""
    for letter in result.strip()[1:-1] + ",":
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append(next(iter(arrays(piece)), None))
            piece = ""
        else:
            piece += letter
    return found


def _place(program: Program, instruction: Instruction) -> str:
    known = [(f, line) for f, line in program.source(instruction) if "/mmx/" in f or "/pallas_kernels/" in f]
    known = known or list(program.source(instruction)[:1])
    if not known:
        return instruction.operation
    file, line = known[0]
    return f"{project_path(file)}:{line} ({instruction.operation})"


def _periods(pattern: tuple[str, ...]) -> int:
    total = len(pattern)
    period = next(n for n in range(1, total + 1) if total % n == 0 and pattern[:n] * (total // n) == tuple(pattern))
    return total // period
