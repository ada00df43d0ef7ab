"""The plan of a run on a named machine: whether it fits, what it moves, how long it takes and what a stage costs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from mmx.config import ConfigError, Run, count_parameters, training_flops
from mmx.parallel import build_mesh
from mmx.plan import calibration
from mmx.plan.analytic import EXCHANGE, PartCount, count_step, roofline_seconds
from mmx.plan.hlo import Program, parse
from mmx.plan.kernels import kernel_seconds
from mmx.plan.links import Torus
from mmx.plan.machine import Machine
from mmx.plan.memory import Memory, analytic_memory, carried, compiled_memory, largest_buffers, state_on
from mmx.plan.out_of_memory import one_sentence
from mmx.plan.schedule import Schedule, play
from mmx.plan.topology import compile_train_step, topology_devices
from pallas_kernels.aot.compile import compiler_version
from pallas_kernels.softmax_attention.pairs import default_block

# A step that leaves less of the memory free is no plan: allocations of other programs, and what changes with versions.
LEAST_FREE = 0.10
DAY = 86_400


@dataclasses.dataclass
class Part:
    """One part of the model in one step of one device; seconds."""

    compute: float  # cycles that the compiler counts
    matrix_units: float  # its FLOPs at the peak
    hbm: float  # its bytes at the published bandwidth
    links: float  # its messages on the links
    waiting: float  # of those, what nothing hides
    limit: str  # the scarcest resource


@dataclasses.dataclass
class Message:
    """Collectives of one kind along some mesh axes, in one step of one device."""

    kind: str
    axes: str
    crosses: str
    times: int
    bytes: float
    seconds: float
    waiting: float
    overlapped: float  # share of the times with work beside them


@dataclasses.dataclass
class KernelShare:
    """Calls of one Pallas kernel in one step of one device."""

    name: str
    times: int
    seconds: float
    share: float  # of the predicted step


@dataclasses.dataclass
class Plan:
    """Everything that is known of a run on a machine. What was not compiled is None."""

    machine: Machine
    run: Run
    mesh: dict[str, int]
    parameters: int
    tokens: int  # a step
    model_flops: float  # a step, all devices
    memory_available: float
    memory_counted: Memory
    counted_seconds: float  # roofline of the counts
    counted: dict[str, Part]
    work: str = "train"  # or "prefill", or "decode"
    compiler: str | None = None
    compile_seconds: float | None = None
    memory: Memory | None = None
    peak_live: float | None = None  # bytes that are alive at the fullest moment
    padding: float | None = None  # bytes of the carried arrays that are no numbers
    buffers: list[Any] = dataclasses.field(default_factory=list)
    program_flops: float | None = None  # one device, loops counted as often as they turn
    compiler_flops: float | None = None  # the compiler's own count, a loop's body once
    seconds: float | None = None  # predicted by the schedule
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    kernels: list[KernelShare] = dataclasses.field(default_factory=list)
    messages: list[Message] = dataclasses.field(default_factory=list)

    @property
    def used(self) -> float:
        """Bytes of a device's memory: as compiled, or as counted where nothing was."""
        return (self.memory or self.memory_counted).total

    @property
    def free(self) -> float:
        """Share of a device's memory that stays free."""
        return 1 - self.used / self.memory_available

    @property
    def fits(self) -> bool:
        """Whether enough stays free."""
        return self.free >= LEAST_FREE

    @property
    def step_seconds(self) -> float:
        """Predicted: by the schedule, or the roofline of the counts where nothing was compiled."""
        return self.counted_seconds if self.seconds is None else self.seconds

    @property
    def predicted_mfu(self) -> float:
        """Model FLOPs over what the devices could do in that time."""
        return self.model_flops / (self.step_seconds * self.machine.devices * self.machine.part.flops)

    @property
    def steps(self) -> int:
        """Of the whole stage, at the batch that it begins with."""
        data, train = self.run.data, self.run.train
        return train.steps or -(-train.tokens // (data.batch_size * data.sequence_length))

    @property
    def stage_days(self) -> float:
        """Days that the stage takes on this machine."""
        return self.steps * self.step_seconds / DAY

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields and what follows from them."""
        plain = dataclasses.asdict(self)
        derived = {
            "chips": self.machine.chips,
            "devices": self.machine.devices,
            "bytes_used": self.used,
            "share_free": self.free,
            "fits": self.fits,
            "predicted_step_seconds": self.step_seconds,
            "predicted_mfu": self.predicted_mfu,
            "predicted_tokens_per_day": self.tokens / self.step_seconds * DAY,
            "calibration": calibration.honesty(),
        }
        if self.work == "train":
            derived["predicted_stage_days"] = self.stage_days
            derived["predicted_stage_chip_hours"] = self.stage_days * 24 * self.machine.chips
        return {"compiled": self.memory is not None, **derived, **plain}


def counted_plan(run: Run, machine: Machine) -> Plan:
    """The half of a plan that needs no compiler.

    Raises:
      ConfigError: if the run cannot be split over the machine.
    """
    run.validate(machine.devices)
    parts = count_step(run, machine)
    lengths = [run.data.sequence_length] * run.data.batch_size
    return Plan(
        machine=machine,
        run=run,
        mesh=run.mesh.sizes(machine.devices),
        parameters=count_parameters(run.model).total,
        tokens=run.data.batch_size * run.data.sequence_length,
        model_flops=training_flops(run.model, lengths),
        memory_available=machine.part.memory,
        memory_counted=analytic_memory(run, machine.devices),
        counted_seconds=roofline_seconds(parts, machine),
        counted={name: _counted_part(name, part, parts, machine) for name, part in parts.items()},
    )


def compiled_plan(run: Run, machine: Machine, say: Callable[[str], None] = lambda line: None) -> Plan:
    """The whole plan of a run on a TPU slice.

    Raises:
      ConfigError: if the run cannot be split over the machine, the compiler is missing, or the step needs more memory
        than a device has: with the largest buffers and where they come from.
    """
    plan = counted_plan(run, machine)

    def build(mesh: jax.sharding.Mesh) -> tuple[jax.stages.Compiled, Callable[[Program], Memory]]:
        compiled = compile_train_step(run, mesh)
        return compiled, lambda program: compiled_memory(compiled, program, state_on(run, mesh))

    return compiled_on(plan, build, say)


def compiled_on(
    plan: Plan,
    build: Callable[[jax.sharding.Mesh], tuple[jax.stages.Compiled, Callable[[Program], Memory]]],
    say: Callable[[str], None],
) -> Plan:
    """Completes a plan by compiling.

    Args:
      plan: with everything that needs no compiler.
      build: compiles on a mesh and returns the program and what tells its memory apart.

    Raises:
      ConfigError: as ``compiled_plan``.
    """
    run, machine = plan.run, plan.machine
    devices = topology_devices(machine.name)
    if len(devices) != machine.devices:
        raise ConfigError(f"libtpu gives {machine.name!r} {len(devices)} devices where {machine.devices} were expected")
    mesh = build_mesh(run.mesh, devices)
    say(f"compiling for {machine.name} with libtpu {compiler_version()}; a large model takes one to three minutes")
    started = time.perf_counter()
    try:
        compiled, memory = build(mesh)
    except Exception as error:
        raise one_sentence(error, machine, plan.memory_counted) from error
    plan.compile_seconds = time.perf_counter() - started
    plan.compiler = f"libtpu {compiler_version()}, jax {jax.__version__}"
    program = parse(compiled.as_text())
    plan.memory = memory(program)
    plan.peak_live = float(compiled.memory_analysis().peak_memory_in_bytes)
    _, gradients, copies = carried(program)
    plan.padding = float(sum(a.padded_size - a.size for a in (*gradients, *copies)))
    plan.buffers = largest_buffers(program, 8)
    plan.compiler_flops = _compiler_flops(compiled)
    _take_schedule(plan, schedule_of(program, run, machine, mesh))
    return plan


def schedule_of(program: Program, run: Run, machine: Machine, mesh: jax.sharding.Mesh) -> Schedule:
    """A compiled step played through on the machine's links."""
    chip = machine.part
    torus = Torus(chip, list(mesh.devices.flat), dict(mesh.shape))
    # Loops over blocks of keys: half of a rank's blocks on average, as causal attention to one document has it.
    local = run.data.sequence_length // mesh.shape["context"]
    with jax.set_mesh(mesh):
        blocks = local / default_block(local)
    return play(program, chip, torus, kernel_seconds(chip), max(1.0, blocks / 2))


def _take_schedule(plan: Plan, schedule: Schedule) -> None:
    part = plan.machine.part
    plan.seconds = schedule.seconds
    plan.program_flops = schedule.work.flops
    for name, found in sorted(schedule.parts.items(), key=lambda item: -(item[1].busy + item[1].waiting)):
        resources = {
            "matrix units": found.work.flops / part.flops,
            "HBM": found.work.bytes / part.bandwidth,
            "links": found.links,
        }
        limit = max(resources, key=resources.get)
        # The compiler counts far more than peak and bandwidth ask for: vector units, or products that do not fill.
        if found.busy > 2 * max(resources.values()):
            limit = "vector units"
        if found.waiting > found.busy:
            limit = "links"
        plan.parts[name] = Part(found.busy, *resources.values(), found.waiting, limit)
    for name, calls in sorted(schedule.kernels.items(), key=lambda item: -item[1].seconds):
        plan.kernels.append(KernelShare(name, round(calls.times), calls.seconds, calls.seconds / schedule.seconds))
    for (kind, axes, crosses), traffic in sorted(schedule.traffic.items(), key=lambda item: -item[1].seconds):
        plan.messages.append(
            Message(
                kind,
                " x ".join(axes) or "none",
                crosses,
                round(traffic.times),
                traffic.bytes,
                traffic.seconds,
                traffic.waiting,
                traffic.overlapped / traffic.times if traffic.times else 0.0,
            )
        )


def _counted_part(name: str, part: PartCount, parts: dict[str, PartCount], machine: Machine) -> Part:
    resources = part.by_resource(machine)
    hidden = parts["experts"].computing(machine) if name == EXCHANGE else 0.0
    waiting = max(0.0, part.links - hidden)
    return Part(part.computing(machine), *resources.values(), waiting, max(resources, key=resources.get))


def _compiler_flops(compiled: jax.stages.Compiled) -> float | None:
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return None if not analysis else float(analysis.get("flops", 0.0))
