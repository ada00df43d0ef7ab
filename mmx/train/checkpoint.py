"""Checkpoints: the training state and the position of the run, written by Orbax without stopping the training.

A checkpoint is a folder ``<step>`` with three items: ``state`` (parameters, optimizer, counters; nested dictionaries of
arrays), ``progress`` (step, tokens, position in the data) and ``model`` (the model's configuration). Orbax writes under
another name and renames at the end, so what bears a step's name was complete when it was written. Just before, process
0 adds the checksums of all files, and they are compared before a checkpoint is used.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization
from jax.sharding import NamedSharding, SingleDeviceSharding

from mmx.config import CheckpointConfig, ConfigError, ModelConfig, from_dict, to_dict
from mmx.model.text import init_params, parameter_specs
from mmx.parallel.processes import Board
from mmx.train.checksums import find_damage, first_of, write_checksums
from mmx.train.health import fresh_health
from mmx.train.step import TrainState

CHECKPOINTS = "checkpoints"  # within a workdir
DAMAGED = "damaged"
_UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's, behind the step's name
# Items of a checkpoint.
STATE, PROGRESS, MODEL = "state", "progress", "model"
# In the progress of a checkpoint without a run: launch.convert wrote its parameters, and there is nothing else.
PARAMETERS_ONLY = "parameters_only"


@dataclasses.dataclass
class Progress:
    """Where a run stands.

    Attributes:
      step, tokens: done in all.
      data: the loader's state, of the stage's own stream.
      stage: index of the stage that the last step belonged to; 0 in a run without stages.
      step_before_stage, tokens_before_stage: ``step`` and ``tokens`` when it began.
      growth: state of the batch's growth in this stage.
      noise: state of the averages behind the gradient noise scale.
    """

    step: int
    tokens: int
    data: dict[str, Any]
    rollbacks: int = 0  # times that the run went back to a checkpoint by itself
    stage: int = 0
    step_before_stage: int = 0
    tokens_before_stage: int = 0
    growth: dict[str, Any] = dataclasses.field(default_factory=dict)
    noise: dict[str, float] = dataclasses.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of a run, newest last."""

    def __init__(self, folder: Path, config: CheckpointConfig, log: Callable[[str], None]):
        self._folder = folder.absolute()
        self._log = log
        self._board = Board()
        self._saving: int | None = None
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(
                # Orbax calls it on process 0, in its own thread, when all is written and before the final rename.
                post_finalization_callback=self._seal,
                barrier_sync_fn=_wait_for_others,
            ),
        )
        self._manager = self._open()

    def save(self, model: ModelConfig, state: TrainState, progress: Progress) -> None:
        """Starts saving; returns once the state may change again.

        Raises:
          ConfigError: if the disk has no room for it; what was saved before stays.
        """
        self._manager.wait_until_finished()  # As saving would: the room that is left is known only then.
        self._require_room(state)
        values = _to_dict(state)
        self._saving = progress.step
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(values, save_args=_save_args(values)),
                progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
                model=ocp.args.JsonSave(to_dict(model)),
            ),
            force=True,
        )

    def _require_room(self, state: TrainState) -> None:
        """A disk that fills up while Orbax writes ends the run too, but under pages of its threads' tracebacks."""
        arrays = (x for x in jax.tree.leaves(state) if isinstance(x, jax.Array))
        needed = sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.replica_id == 0)
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            kept = "nothing is saved yet" if self.latest is None else f"step {self.latest} is the last that is saved"
            raise ConfigError(
                f"the disk is full: {self._folder} has {free >> 20:,} MiB left and a checkpoint needs "
                f"{needed >> 20:,}; free some space and start again ({kept})"
            )

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, those being written included."""
        return self._manager.latest_step()

    def restore(
        self, model: ModelConfig, layout: Callable[[Progress], TrainState]
    ) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint that can be read, laid out as ``layout`` wants a run that stands there; None without.

        One that is damaged or cannot be read is named in the log and set aside in a folder of its own, and the one
        before is tried. The processes share the reading of checksums and decide together.

        Raises:
          ConfigError: if the checkpoints are of another model.
        """
        while (step := self._manager.latest_step()) is not None:
            if damage := self._find_damage(step):
                self._set_aside(step, first_of(damage))
                continue
            try:
                saved = self._manager.restore(
                    step, args=ocp.args.Composite(model=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore())
                )
                _require_same(from_dict(saved["model"], ModelConfig), model, self._folder / str(step))
                if PARAMETERS_ONLY in saved["progress"]:
                    raise ConfigError(
                        f"{self._folder.parent} holds converted parameters and no run: train in another workdir, "
                        f"with --config.checkpoint.initial={self._folder.parent}"
                    )
                progress = Progress(**saved["progress"])
                # Checkpoints of the first versions count no rollbacks, and have no health in their state.
                state = self._restore_state(step, layout(progress), has_health="rollbacks" in saved["progress"])
                failure = ""
            except ConfigError:
                raise
            except Exception as error:  # Whatever Orbax, tensorstore or JSON make of a file that has no checksum.
                failure = " ".join(str(error).split())[:100] or type(error).__name__
            failures = [failure for failure in self._board.gather(failure) if failure]
            if not failures:
                return state, progress
            self._set_aside(step, failures[0])
        return None

    def _restore_state(self, step: int, abstract: TrainState, has_health: bool) -> TrainState:
        target = _to_dict(abstract)
        health = target.pop("health")
        if has_health:
            target["health"] = health
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))[STATE]
        if not has_health:
            places = jax.tree.map(lambda x: x.sharding, health)
            restored["health"] = jax.device_put(_to_dict(fresh_health()), places)
        return serialization.from_state_dict(abstract, restored)

    def wait(self) -> None:
        """Returns when everything that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._folder, options=self._options)

    def _seal(self) -> None:
        unfinished = [path for path in self._folder.glob(f"{self._saving}{_UNFINISHED}*") if path.is_dir()]
        if len(unfinished) == 1:
            write_checksums(unfinished[0])

    def _find_damage(self, step: int) -> list[str]:
        mine = find_damage(self._folder / str(step), self._board.index, self._board.count)
        return [phrase for part in self._board.gather(json.dumps(mine)) for phrase in json.loads(part)]

    def _set_aside(self, step: int, reason: str) -> None:
        self._manager.close()
        damaged = self._folder / str(step)
        kept = self._folder.parent / f"{self._folder.name}-{DAMAGED}" / str(step)
        if self._board.index == 0:
            kept.parent.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            damaged.rename(kept)
        self._board.gather("moved")
        self._log(f"checkpoint {damaged} cannot be used ({reason}); moved to {kept}, going back to the one before")
        self._manager = self._open()


def _wait_for_others(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier, which a process whose part of a save has failed leaves out.

    Orbax goes there while the failure is on its way to whoever waits for the save. The others never come: they are at
    the barrier before it, for twenty minutes. Without the wait the failure ends this process, and that ends theirs.
    """
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def load_params(folder: Path, step: int | None = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Parameters and model configuration of a checkpoint: on the mesh in scope, or on the first device without one.

    Args:
      folder: of the run's checkpoints.
      step: None takes the newest.

    Raises:
      ConfigError: if there is no such checkpoint, or it is damaged.
    """
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            raise ConfigError(f"{folder} holds no checkpoint{'' if step is None else f' of step {step}'}")
        if damage := find_damage(folder / str(step)):
            others = ", ".join(str(folder / str(other)) for other in manager.all_steps() if other != step)
            raise ConfigError(f"{folder / str(step)} is damaged: {first_of(damage)}; there is {others or 'no other'}")
        model = from_dict(
            manager.restore(step, args=ocp.args.Composite(model=ocp.args.JsonRestore()))["model"], ModelConfig
        )
        mesh, device = jax.sharding.get_mesh(), SingleDeviceSharding(jax.local_devices()[0])
        place = lambda x, spec: jax.ShapeDtypeStruct(  # noqa: E731
            x.shape, x.dtype, sharding=device if mesh.empty else NamedSharding(mesh, spec)
        )
        abstract = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
        target = {"params": jax.tree.map(place, abstract, parameter_specs(model))}
        restore = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        return model, manager.restore(step, args=ocp.args.Composite(state=restore))["state"]["params"]


def find_checkpoints(directory: Path) -> tuple[Path, int | None]:
    """The folder of checkpoints that a path means, and the step: a workdir means its newest (None).

    Raises:
      ConfigError: if the path is neither a workdir with checkpoints nor one of them.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory")
    if (directory / CHECKPOINTS).is_dir():
        return directory / CHECKPOINTS, None
    if directory.parent.name == CHECKPOINTS and directory.name.isdigit():
        return directory.parent, int(directory.name)
    raise ConfigError(f"{directory} holds no checkpoints: give the workdir of a run or one of its checkpoints")


def load_initial(directory: Path, model: ModelConfig) -> dict[str, Any]:
    """Parameters that a run of ``model`` starts from, in its dtype, laid out as ``load_params`` does.

    Raises:
      ConfigError: if there are none, or they are of another model.
    """
    saved, params = load_params(*find_checkpoints(directory))
    _require_same(saved, model, directory)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return jax.tree.map(lambda x, shape: x.astype(shape.dtype), params, shapes)


def _to_dict(state: TrainState) -> dict[str, Any]:
    """Nested dictionaries of arrays, without the classes of any library."""
    return serialization.to_state_dict(state)


def _save_args(values: dict[str, Any]) -> dict[str, Any]:
    """Chunks of one layer, and of one expert in it, so that a conversion can read them one by one in bounded memory."""

    def chunk(path: Any, x: Any) -> ocp.SaveArgs:
        keys = {getattr(key, "key", None) for key in path}
        stacked = 0 if "runs" not in keys else 3 if "experts" in keys else 2
        return ocp.SaveArgs(shard_axes=tuple(range(min(stacked, getattr(x, "ndim", 0)))))

    return jax.tree_util.tree_map_with_path(chunk, values)


def _require_same(saved: ModelConfig, wanted: ModelConfig, path: Path) -> None:
    """Raises ConfigError, naming all fields that differ, if a checkpoint's parameters are not the wanted model's."""
    differing = []
    for field in dataclasses.fields(ModelConfig):
        old, new = (_value(config, field.name) for config in (saved, wanted))
        if field.name in _SHAPES | _ARITHMETIC and old != new:
            differing.append(f"model.{field.name}={old!r} and this run has {new!r}")
    if differing:
        raise ConfigError(f"{path} has {', '.join(differing)}: use another workdir or the same model")


def _value(config: ModelConfig, field: str) -> Any:
    """A field as it takes effect: an alpha that is not given has a value all the same."""
    return config.alpha(field.removesuffix("_alpha")) if field.endswith("_alpha") else getattr(config, field)


# Fields that decide the shapes of parameters.
_SHAPES = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "num_layers",
        "layer_pattern",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "num_experts",
        "expert_hidden_size",
        "tie_embeddings",
    }
)

# Fields that decide what the same parameters compute. RoPE's base is not among them: context extension changes it.
# What is in neither set may change between runs.
_ARITHMETIC = frozenset(
    {
        "experts_per_token",
        "rotary_dim",
        "slope_rule",
        "postnorm",
        "norm_eps",
        *(f"{branch}_{scale}" for branch in ("lightning", "softmax", "experts") for scale in ("alpha", "beta")),
    }
)
