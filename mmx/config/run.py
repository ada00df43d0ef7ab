"""The configuration tree of a run: model, mesh, data, optimizer, training, checkpoints.

Files in ``configs/`` build a ``Run``; launchers override single fields with ``--config.branch.field=value``
(ml_collections assigns to the dataclasses, so they are not frozen). ``Run.validate`` is called once, after the
overrides and before anything is written.
"""

import dataclasses
import math

from mmx.config.errors import ConfigError
from mmx.config.model import SEQUENCE_LAYOUTS, ModelConfig

MESH_AXES = ("replica", "fsdp", "expert", "expert_tensor", "context", "tensor")
# Axes over which the sequences of a batch are split (DESIGN: expert and expert_tensor are batch axes to attention).
BATCH_AXES = MESH_AXES[:4]
PHASE_KINDS = ("linear", "constant", "exponential", "cosine")


@dataclasses.dataclass
class MeshConfig:
    """Sizes of the named mesh axes; one of them may be -1 for "the rest of the devices"."""

    replica: int = 1
    fsdp: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    tensor: int = 1

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis name to size, with -1 resolved. Raises ConfigError if they do not multiply to num_devices."""
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{axis}={size}: use a positive size, or -1 for the rest of the devices")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ConfigError(f"mesh.{free[0]} and mesh.{free[1]} are both -1: only one axis can take the rest")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free:
            if num_devices % fixed:
                raise ConfigError(
                    f"mesh.{free[0]}=-1 cannot take the rest: the other axes make {fixed}, which does not divide "
                    f"{num_devices} devices"
                )
            sizes[free[0]] = num_devices // fixed
        elif fixed != num_devices:
            raise ConfigError(
                f"the mesh has {_product(sizes)} = {fixed} devices and this run has {num_devices}: "
                "change a mesh axis, or set one to -1"
            )
        return sizes


@dataclasses.dataclass
class MixturePoint:
    """Weights, as in ``data.mixture``, that hold at one row of the stream; between two points they move linearly."""

    row: int
    weights: tuple[str, ...]


@dataclasses.dataclass
class DataConfig:
    """What is read, and in which portions."""

    # A folder written by launch.prepare.
    path: str = "data/standard_library"
    sequence_length: int = 512
    # Sequences a step, over all processes and micro-batches.
    batch_size: int = 8
    # Shares of the tokens: "source=weight", "source/bucket=weight" for its documents of some lengths, or
    # "*/bucket=weight" for those of all sources; empty takes every source in proportion to its tokens. Synthetic
    # sources (launch.prepare --long_qa) are read only where they are named.
    mixture: tuple[str, ...] = ()
    # The same, changing over the rows of the stream; before the first point its weights hold, after the last its own.
    mixture_points: tuple[MixturePoint, ...] = ()
    # Length buckets, in tokens of a document: short is below the one, long above the other, medium between (Table 6).
    short_below: int = 2**15
    long_above: int = 2**17
    # Held-out sequences an evaluation reads, always the same ones; 0 turns evaluation off.
    heldout_sequences: int = 64
    read_threads: int = 2


@dataclasses.dataclass
class Phase:
    """One piece of the learning-rate schedule.

    ``to`` is the rate at its end as a share of ``optimizer.peak_lr`` (a constant phase holds it throughout). Its
    length is ``steps`` or ``tokens``; the last phase may have neither and lasts until the end.
    """

    kind: str
    to: float
    steps: int = 0
    tokens: int = 0


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW as the report has it (section 4.2); eps and clipping are not printed there and are our choice."""

    peak_lr: float = 2e-4
    schedule: tuple[Phase, ...] = (Phase("linear", 1.0, steps=500), Phase("constant", 1.0))
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    # Largest global norm of the gradient; 0 turns clipping off.
    clip_norm: float = 1.0


@dataclasses.dataclass
class TrainConfig:
    """Length of the run and what it reports."""

    steps: int = 300
    seed: int = 0
    # Micro-batches a step accumulates its gradient over.
    micro_batches: int = 1
    log_every: int = 10
    # Steps between held-out evaluations; 0 evaluates only at the start and the end.
    eval_every: int = 0
    # A loss above this multiple of the running average (over about 50 steps) is a spike, whose step is skipped as those
    # that are not finite are; 0 skips the latter alone.
    spike_factor: float = 0.0
    # Skipped steps in a row after which the run goes back to its last checkpoint and goes on with the data behind them;
    # 0 never goes back.
    rollback_after: int = 0
    # Seconds that a step, a save or an evaluation may take before the run counts as hung: it writes the stacks of its
    # threads to the workdir and ends; 0 waits for ever. Compiling the step does not count.
    hang_seconds: float = 1800.0


@dataclasses.dataclass
class CheckpointConfig:
    """When the state is saved, how many saves stay, and what a fresh run starts from."""

    every: int = 100
    keep: int = 2
    # Parameters that a fresh run starts from: a workdir, or one of its checkpoints; empty draws them at random.
    initial: str = ""


@dataclasses.dataclass
class Run:
    """A whole run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def validate(self, num_devices: int = 1) -> None:
        """Checks every branch and what must agree between them.

        Args:
          num_devices: devices of the whole run, over all processes.

        Raises:
          ConfigError: with one sentence that names the field and says what to change.
        """
        self.model.validate()
        sizes = self.mesh.sizes(num_devices)
        self._validate_counts()
        self._validate_mixture()
        self._validate_split(sizes)
        self._validate_optimizer()

    def _validate_counts(self) -> None:
        for path, least in {
            "data.sequence_length": 2,
            "data.batch_size": 1,
            "data.short_below": 1,
            "data.long_above": 1,
            "data.heldout_sequences": 0,
            "data.read_threads": 1,
            "train.steps": 1,
            "train.micro_batches": 1,
            "train.log_every": 1,
            "train.eval_every": 0,
            "train.rollback_after": 0,
            "train.hang_seconds": 0,
            "checkpoint.every": 1,
            "checkpoint.keep": 1,
        }.items():
            branch, field = path.split(".")
            value = getattr(getattr(self, branch), field)
            if value < least:
                raise ConfigError(f"{path}={value} is too small: set it to at least {least}")
        if self.train.spike_factor and self.train.spike_factor <= 1:
            raise ConfigError(
                f"train.spike_factor={self.train.spike_factor} would skip ordinary steps: use 0, or more than 1"
            )

    def _validate_mixture(self) -> None:
        data = self.data
        if data.short_below > data.long_above + 1:
            raise ConfigError(
                f"data.short_below={data.short_below} is above data.long_above={data.long_above}: a document would be "
                "in two buckets"
            )
        if data.mixture and data.mixture_points:
            raise ConfigError("data.mixture and data.mixture_points are both set: empty one of them")
        earliest = 0
        for index, point in enumerate(data.mixture_points):
            if point.row < earliest:
                raise ConfigError(
                    f"data.mixture_points[{index}].row={point.row} must be at least {earliest}: give the points in the "
                    "order of their rows, one a row"
                )
            earliest = point.row + 1

    def _validate_split(self, sizes: dict[str, int]) -> None:
        model = self.model
        slices = SEQUENCE_LAYOUTS[model.sequence_layout] if sizes["context"] > 1 else 1
        splits = (
            ("data.sequence_length", self.data.sequence_length, ("context", "tensor"), slices),
            ("model.num_heads", model.num_heads, ("tensor",), 1),
            ("model.num_kv_heads", model.num_kv_heads, ("tensor",), 1),
            ("model.vocab_size", model.vocab_size, ("tensor",), 1),
            ("model.num_experts", model.num_experts, ("expert",), 1),
            ("model.expert_hidden_size", model.expert_hidden_size, ("expert_tensor",), 1),
            # A weight's hidden dimension is stored in parts on all devices that would hold copies (replica excepted).
            ("model.hidden_size", model.hidden_size, ("fsdp", "expert", "expert_tensor", "context"), 1),
            ("model.hidden_size", model.hidden_size, ("fsdp", "context", "tensor"), 1),
            ("data.batch_size", self.data.batch_size, BATCH_AXES, self.train.micro_batches),
        )
        for name, value, axes, factor in splits:
            ways = math.prod(sizes[axis] for axis in axes)
            if value % (ways * factor):
                over = " x ".join(axis for axis in axes if sizes[axis] > 1)
                parts = f"{over} = {ways}" if over else ""
                if factor > 1:
                    reason = "slices of model.sequence_layout" if axes[0] == "context" else "train.micro_batches"
                    parts += f"{' and ' if parts else ''}{reason} = {factor}"
                raise ConfigError(f"{name}={value} cannot be split over {parts}: use a multiple of {ways * factor}")
        devices = math.prod(sizes.values())
        tokens = self.data.batch_size * self.data.sequence_length // (self.train.micro_batches * devices)
        if tokens % model.exchange_groups:
            raise ConfigError(
                f"model.exchange_groups={model.exchange_groups} does not divide the {tokens} tokens that a device has "
                "in a micro-batch: use a divisor of them"
            )

    def _validate_optimizer(self) -> None:
        optimizer = self.optimizer
        for field in ("peak_lr", "eps"):
            if getattr(optimizer, field) <= 0:
                raise ConfigError(f"optimizer.{field}={getattr(optimizer, field)} must be greater than 0")
        for field in ("b1", "b2"):
            if not 0 <= getattr(optimizer, field) < 1:
                raise ConfigError(f"optimizer.{field}={getattr(optimizer, field)} must be in [0, 1)")
        for field in ("weight_decay", "clip_norm"):
            if getattr(optimizer, field) < 0:
                raise ConfigError(f"optimizer.{field}={getattr(optimizer, field)} must not be negative")
        if not optimizer.schedule:
            raise ConfigError("optimizer.schedule is empty: give at least one Phase")
        for index, phase in enumerate(optimizer.schedule):
            where = f"optimizer.schedule[{index}]"
            if phase.kind not in PHASE_KINDS:
                raise ConfigError(f"{where}.kind={phase.kind!r} is not one of {', '.join(PHASE_KINDS)}")
            if phase.steps < 0 or phase.tokens < 0 or (phase.steps and phase.tokens):
                raise ConfigError(f"{where} needs either steps or tokens, positive")
            is_last = index == len(optimizer.schedule) - 1
            if not (phase.steps or phase.tokens) and not (is_last and phase.kind == "constant"):
                raise ConfigError(f"{where} has no length: only a last, constant phase may go on until the end")
            previous = optimizer.schedule[index - 1].to if index else 0.0
            if phase.kind == "exponential" and (phase.to <= 0 or previous <= 0):
                raise ConfigError(f"{where} decays exponentially, so it must start and end above 0")


def _product(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1"
