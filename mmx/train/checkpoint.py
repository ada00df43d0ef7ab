"""Checkpoints: the training state and the position of the run, written by Orbax without stopping the training.

A checkpoint is a folder ``<step>`` with three items: ``state`` (parameters, optimizer, counters; nested dictionaries of
arrays), ``progress`` (step, tokens, position in the data) and ``model`` (the model's configuration). Orbax writes under
another name and renames at the end, so what bears a step's name was complete when it was written.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import serialization

from mmx.config import CheckpointConfig, ConfigError, ModelConfig, from_dict, to_dict
from mmx.model.text import init_params
from mmx.train.step import TrainState

DAMAGED = "damaged"


@dataclasses.dataclass
class Progress:
    """Where a run stands. ``data`` is the loader's state."""

    step: int
    tokens: int
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, newest last."""

    def __init__(self, folder: Path, config: CheckpointConfig, log: Callable[[str], None]):
        self._folder = folder.absolute()
        self._log = log
        self._options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, enable_async_checkpointing=True)
        self._manager = self._open()

    def save(self, model: ModelConfig, state: TrainState, progress: Progress) -> None:
        """Starts saving; returns once the state may change again.

        Raises:
          ConfigError: if the disk has no room for it; what was saved before stays.
        """
        self._manager.wait_until_finished()  # As saving would: the room that is left is known only then.
        self._require_room(state)
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_to_dict(state)),
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

    def restore(self, model: ModelConfig, abstract: TrainState) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint that can be read, laid out as ``abstract``; None if there is none.

        One that cannot be read is named in the log and set aside in a folder of its own, and the one before is tried.

        Raises:
          ConfigError: if the checkpoints are of another model.
        """
        while (step := self._manager.latest_step()) is not None:
            try:
                saved = self._manager.restore(
                    step, args=ocp.args.Composite(model=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore())
                )
                _require_same(from_dict(saved["model"], ModelConfig), model, self._folder / str(step))
                target = ocp.args.Composite(state=ocp.args.StandardRestore(_to_dict(abstract)))
                state = serialization.from_state_dict(abstract, self._manager.restore(step, args=target)["state"])
                return state, Progress(**saved["progress"])
            except ConfigError:
                raise
            except Exception as error:  # Whatever Orbax, tensorstore or JSON make of a truncated file.
                self._set_aside(step, error)
        return None

    def wait(self) -> None:
        """Returns when everything that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases the threads."""
        self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self._folder, options=self._options)

    def _set_aside(self, step: int, error: Exception) -> None:
        self._manager.close()
        damaged = self._folder / str(step)
        kept = self._folder.parent / f"{self._folder.name}-{DAMAGED}" / str(step)
        if jax.process_index() == 0:
            kept.parent.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            damaged.rename(kept)
        reason = " ".join(str(error).split())[:100]
        self._log(f"checkpoint {damaged} cannot be read ({reason}); moved to {kept}, going back to the one before")
        self._manager = self._open()


def load_params(folder: Path, step: int | None = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Parameters and model configuration of a checkpoint, on this process's first device.

    Args:
      folder: of the run's checkpoints.
      step: None takes the newest.

    Raises:
      ConfigError: if there is no such checkpoint.
    """
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            raise ConfigError(f"{folder} holds no checkpoint{'' if step is None else f' of step {step}'}")
        model = from_dict(
            manager.restore(step, args=ocp.args.Composite(model=ocp.args.JsonRestore()))["model"], ModelConfig
        )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
        target = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)}
        restore = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        return model, manager.restore(step, args=ocp.args.Composite(state=restore))["state"]["params"]


def _to_dict(state: TrainState) -> dict[str, Any]:
    """Nested dictionaries of arrays, without the classes of any library."""
    return serialization.to_state_dict(state)


def _require_same(saved: ModelConfig, wanted: ModelConfig, path: Path) -> None:
    """Raises ConfigError if a checkpoint's parameters are not those of the wanted model."""
    for field in dataclasses.fields(ModelConfig):
        old, new = getattr(saved, field.name), getattr(wanted, field.name)
        if field.name in _SHAPES and old != new:
            raise ConfigError(
                f"{path} has model.{field.name}={old!r} and this run has {new!r}: use another workdir or the same model"
            )


# Fields that decide the shapes of parameters; the others may change between runs.
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
