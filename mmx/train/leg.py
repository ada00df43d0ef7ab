"""A leg of a run: steps of one stage at one batch size, and what they need on their mesh.

Legs follow each other in one process. Between them the state is laid out anew, and the next leg compiles its own step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mmx.config import ConfigError, MeshConfig, ModelConfig, Run
from mmx.data.loader import PreparedData
from mmx.model.text import Params
from mmx.parallel import build_mesh
from mmx.parallel.compiler import compiler_options
from mmx.parallel.sequence_layout import SequenceLayout
from mmx.train.checkpoint import Progress
from mmx.train.evaluate import HeldoutLoss, heldout_loss, heldout_sums
from mmx.train.placement import BatchPlacement
from mmx.train.step import TrainState, abstract_params, abstract_state, train_step

# Up to four passes over documents teach nearly as much as new ones, more teach ever less (Muennighoff et al.,
# "Scaling Data-Constrained Language Models", 2023).
WORTHWHILE_PASSES = 4


class Leg:
    """Mesh, batches and compiled programs of one stage at one batch size.

    Attributes:
      run: the stage's run, at its initial batch size.
      mesh: None on a single device, where everything is ordinary JAX.
      batches: the stage's training data; its state is the position of the run.
      tokens_per_step: of this leg.
    """

    def __init__(self, run: Run, stage: int, doublings: int = 0):
        """Opens the data of ``run.of_stage(stage)``, whose batch has doubled so often.

        Raises:
          ConfigError: if the data or the tokenizer do not fit the configuration.
        """
        self.run = run.of_stage(stage)
        self.mesh = stage_mesh(self.run.mesh)
        self.stage, self.doublings = stage, doublings
        grown = _grown(self.run, doublings)
        self._micro_batches = grown.train.micro_batches
        self._data = require_data(self.run)
        self._heldout_placement = self._placement_of(self.run)
        self.placement = self._placement_of(grown)
        training = self._data if not doublings else PreparedData(grown.data)
        self.batches = training.training_batches(_seed(run.train.seed, stage), self.placement.share)
        self.tokens_per_step = grown.data.batch_size * grown.data.sequence_length

    def often_repeated(self) -> dict[str, float]:
        """Parts of the data that the whole stage goes over more than ``WORTHWHILE_PASSES`` times, and how often."""
        train, data = self.run.train, self.run.data
        lengths = (-(-train.tokens // data.sequence_length), train.steps * data.batch_size)
        rows = min(length for length in lengths if length)
        return {str(part): times for part, times in self._data.passes(rows).items() if times > WORTHWHILE_PASSES}

    def in_scope(self) -> AbstractContextManager[Any]:
        """The mesh, as the context that compiling and running on it need."""
        return mesh_in_scope(self.mesh)

    def rows(self, progress: Progress) -> Iterator[Any]:
        """The training rows from where the run stands."""
        if progress.data:  # A stage that begins has none.
            self.batches.set_state(progress.data)
        return iter(self.batches)

    def lay_out(self, state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
        """The state of any other mesh on this one, bit for bit; its old buffers are given up one by one."""
        wanted = abstract_state(self.run.model, optimizer)
        return jax.tree.map(lambda x, like: _moved(x, like.sharding, donate=True), state, wanted)

    def compile(self, state: TrainState, optimizer: optax.GradientTransformation) -> Any:
        """The training step, a function of state, batch and rate that reuses the state's buffers."""
        run = self.run
        step = functools.partial(
            train_step,
            run.model,
            optimizer,
            run.optimizer.clip_norm,
            self._micro_batches,
            spike_factor=run.train.spike_factor,
        )
        lowered = jax.jit(step, donate_argnums=0).lower(state, self.placement.empty(), jnp.float32(0))
        return lowered.compile(compiler_options=compiler_options(self._micro_batches))

    def heldout_loss(self, state: TrainState) -> HeldoutLoss:
        """Loss on the held-out rows."""
        placement = self._heldout_placement
        batches = (placement.to_devices(row) for row in self._data.heldout_batches(placement.share))
        return heldout_loss(lambda batch: self._heldout_sums(state.params, batch), batches)

    @functools.cached_property
    def _heldout_sums(self) -> Any:
        sizes = np.zeros(self.run.model.vocab_size, np.float32)
        token_bytes = self._data.tokenizer.token_bytes()
        sizes[: len(token_bytes)] = token_bytes
        sums = jax.jit(functools.partial(heldout_sums, self.run.model))
        return lambda params, batch: sums(params, batch, jnp.asarray(sizes))

    def _placement_of(self, run: Run) -> BatchPlacement:
        layout = SequenceLayout(run.model.sequence_layout)
        return BatchPlacement(self.mesh, layout, run.data.batch_size, run.data.sequence_length)


def stage_mesh(config: MeshConfig) -> Mesh | None:
    """The mesh over all devices; a single device has none."""
    return None if jax.device_count() == 1 else build_mesh(config)


def mesh_in_scope(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """The mesh, if there is one, as the context that compiling and running on it need."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def move_to_scope(model: ModelConfig, params: Params) -> Params:
    """Parameters from any mesh on the one in scope; those they were made from stay."""
    wanted = abstract_params(model)
    return jax.tree.map(lambda x, like: _moved(x, like.sharding, donate=False), params, wanted)


def _moved(x: jax.Array, sharding: jax.sharding.Sharding, donate: bool) -> jax.Array:
    return x if x.sharding == sharding else jax.device_put(x, sharding, donate=donate)


def _grown(run: Run, doublings: int) -> Run:
    """The run with a batch that has doubled: in more micro-batches of the same size, so that memory stays as it was."""
    factor = 2**doublings
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, batch_size=run.data.batch_size * factor),
        train=dataclasses.replace(run.train, micro_batches=run.train.micro_batches * factor),
    )


def _seed(seed: int, stage: int) -> int:
    """Of the order of a stage's data; the first stage's, and that of a run without stages, is the run's own."""
    return int(np.random.SeedSequence((seed, stage)).generate_state(1)[0] >> 1) if stage else seed


def require_data(run: Run) -> PreparedData:
    """The data of a run without stages. Raises ConfigError if it or its tokenizer does not fit the configuration."""
    data = PreparedData(run.data)
    needed = data.tokenizer.vocab_size
    if needed > run.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={run.model.vocab_size} does not fit the tokenizer of {data.folder}, which has "
            f"{needed} tokens: set it to at least {needed}"
        )
    return data
