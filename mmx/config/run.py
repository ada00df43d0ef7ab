"""The configuration tree of a run: model, mesh, data, optimizer, training, checkpoints.

Files in ``configs/`` build a ``Run``; launchers override single fields with ``--config.branch.field=value``
(ml_collections assigns to the dataclasses, so they are not frozen). ``Run.validate`` is called once, after the
overrides and before anything is written.
"""

import dataclasses
import math

from mmx.config.errors import ConfigError
from mmx.config.mesh import BATCH_AXES, MeshConfig
from mmx.config.model import SEQUENCE_LAYOUTS, ModelConfig
from mmx.config.optimizer import OptimizerConfig
from mmx.config.stage import Stage, mixture_over_rows


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
class TrainConfig:
    """Length of the run, growth of its batch, and what it reports."""

    # The run ends after this many steps in all; 0 leaves it to ``tokens``, or to the stages.
    steps: int = 300
    # The run ends with the step that brings it to this many tokens; 0 leaves it to ``steps``.
    tokens: int = 0
    seed: int = 0
    # Micro-batches a step accumulates its gradient over.
    micro_batches: int = 1
    # Training losses, falling: the batch (and micro_batches with it) doubles when the smoothed loss has reached the
    # first of them, again at the second, and so on (report section 4.2). launch.report --critical_batch fits them.
    batch_marks: tuple[float, ...] = ()
    # Steps over which that loss is smoothed, and for how many in a row it must lie at or below the mark.
    batch_smoothing: int = 50
    batch_patience: int = 10
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
    # Held-out rows of the longest stage's length, on which the loss is measured by position before the first step and
    # at the end of each stage; 0 turns it off.
    position_sequences: int = 0


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
    # One after the other, each with its own length, data and mesh; empty: a single one, as the branches above say.
    stages: tuple[Stage, ...] = ()

    def of_stage(self, index: int) -> "Run":
        """The run of one stage alone: its fields in place of those of the branches, its own length, no stages.

        Without stages it is the run itself.
        """
        if not self.stages:
            return self
        stage = self.stages[index]
        points = [
            MixturePoint(row, weights) for row, weights in mixture_over_rows(self.stages, index, self.data.mixture)
        ]
        level = self.stages[index - 1].schedule[-1].to if index else self.optimizer.start_level
        replace = dataclasses.replace
        return replace(
            self,
            model=replace(self.model, rope_base=stage.rope_base),
            mesh=stage.mesh,
            data=replace(
                self.data,
                sequence_length=stage.sequence_length,
                batch_size=stage.batch_size,
                mixture=points[0].weights if len(points) == 1 else (),
                mixture_points=tuple(points) if len(points) > 1 else (),
                heldout_sequences=stage.heldout_sequences,
            ),
            optimizer=replace(self.optimizer, schedule=stage.schedule, start_level=level),
            train=replace(
                self.train,
                steps=stage.steps,
                tokens=stage.tokens,
                micro_batches=stage.micro_batches,
                batch_marks=stage.batch_marks,
            ),
            stages=(),
        )

    def validate(self, num_devices: int = 1) -> None:
        """Checks every branch and what must agree between them.

        Args:
          num_devices: devices of the whole run, over all processes.

        Raises:
          ConfigError: with one sentence that names the field and says what to change.
        """
        if self.stages:
            self._validate_stages(num_devices)
            return
        self.model.validate()
        sizes = self.mesh.sizes(num_devices)
        self._validate_counts()
        self._validate_length()
        self._validate_mixture()
        self._validate_split(sizes)
        self.optimizer.validate()

    def _validate_stages(self, num_devices: int) -> None:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ConfigError(f"two stages share a name among {', '.join(names)}: rename one")
        for name in ("tokens", "batch_marks"):
            if getattr(self.train, name):
                raise ConfigError(
                    f"train.{name} is set and so are stages: set {name} in the stages that should have it"
                )
        if self.train.steps < 0:
            raise ConfigError(f"train.steps={self.train.steps} must not be negative: 0 leaves the end to the stages")
        for index, stage in enumerate(self.stages):
            try:
                stage.validate()
                self.of_stage(index).validate(num_devices)
            except ConfigError as error:
                raise ConfigError(f"stages[{index}] ({stage.name}): {error}") from None

    def _validate_length(self) -> None:
        train = self.train
        if not (train.steps or train.tokens):
            raise ConfigError(
                "train.steps=0 is too small: set it to at least 1, or give the run its length in train.tokens"
            )
        if any(later >= mark for mark, later in zip(train.batch_marks, train.batch_marks[1:], strict=False)):
            raise ConfigError(f"train.batch_marks={train.batch_marks} must fall: the batch doubles at each in turn")

    def _validate_counts(self) -> None:
        for path, least in {
            "data.sequence_length": 2,
            "data.batch_size": 1,
            "data.short_below": 1,
            "data.long_above": 1,
            "data.heldout_sequences": 0,
            "data.read_threads": 1,
            "train.steps": 0,
            "train.tokens": 0,
            "train.micro_batches": 1,
            "train.batch_smoothing": 1,
            "train.batch_patience": 1,
            "train.position_sequences": 0,
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
