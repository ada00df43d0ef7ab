"""Held-out loss by the position of a token in its document: what a longer context is worth to a model.

Measured before the first step and at the end of each stage, always on the same rows, and kept in one JSON file.

Shapes: B batch, S tokens, N ranges of positions.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmx.config import ModelConfig, Run
from mmx.data.loader import PreparedData
from mmx.model.text import Params, bind
from mmx.parallel.sequence_layout import SequenceLayout
from mmx.train.leg import mesh_in_scope, move_to_scope, stage_mesh
from mmx.train.loss import Batch, next_token_nll
from mmx.train.placement import BatchPlacement

POSITION_LOSS = "position_loss.json"
_FIRST_RANGE = 64


def position_ranges(length: int) -> np.ndarray:
    """Ends of the ranges, doubling: below 64, 64 to 128, and so on up to ``length``; int32 [N]."""
    ends = [_FIRST_RANGE]
    while ends[-1] < length:
        ends.append(2 * ends[-1])
    return np.minimum(np.asarray(ends, np.int32), length)


def position_sums(config: ModelConfig, params: Params, batch: Batch, ends_N: jax.Array) -> jax.Array:
    """Negative log-likelihood (nats) and number of the target tokens in each range of positions, fp32 [2, N]."""
    model = bind(config, params)
    x_BSD, _, _ = model(
        batch.tokens_BS,
        segment_ids_BS=batch.segment_ids_BS,
        positions_BS=batch.positions_BS,
        slice_ids_BT=batch.slice_ids_BT,
    )

    def one_range(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        start, end = bounds
        inside_BS = (batch.positions_BS >= start) & (batch.positions_BS < end)
        weights_BS = jnp.where(inside_BS, batch.weights_BS, 0)
        return jnp.stack([next_token_nll(model, x_BSD, batch.targets_BS, weights_BS), jnp.sum(weights_BS)])

    starts_N = jnp.concatenate([jnp.zeros(1, ends_N.dtype), ends_N[:-1]])
    return lax.map(one_range, (starts_N, ends_N)).T


# One program for all measurements of a model: stages may differ in nothing that matters here.
_compiled_sums = jax.jit(position_sums, static_argnums=0)


class PositionLosses:
    """The measurements of a run; ``measure`` adds one to the file in the workdir."""

    def __init__(self, run: Run, workdir: Path):
        """Rows have the length of the longest stage and lie on its mesh."""
        stages = range(max(1, len(run.stages)))
        longest = run.of_stage(max(stages, key=lambda stage: run.of_stage(stage).data.sequence_length))
        self._run = dataclasses.replace(
            longest,
            data=dataclasses.replace(
                longest.data, mixture=(), mixture_points=(), heldout_sequences=run.train.position_sequences
            ),
        )
        self._path = workdir / POSITION_LOSS
        self._ends_N = position_ranges(self._run.data.sequence_length)

    def measure(self, model: ModelConfig, params: Params, label: str, step: int) -> None:
        """Measures parameters, laid out on any mesh, and writes the result under ``label``, anew if it was there."""
        model = dataclasses.replace(model)  # A copy that nobody changes: it is a key of compiled programs.
        mesh, data = stage_mesh(self._run.mesh), self._run.data
        layout = SequenceLayout(model.sequence_layout)
        placement = BatchPlacement(mesh, layout, data.batch_size, data.sequence_length)
        totals = np.zeros((2, len(self._ends_N)))
        with mesh_in_scope(mesh):
            params = move_to_scope(model, params)
            for row in PreparedData(data).heldout_batches(placement.share):
                sums_2N = _compiled_sums(model, params, placement.to_devices(row), self._ends_N)
                totals += np.asarray(sums_2N, np.float64)
        if jax.process_index() == 0:
            self._write(label, step, model.rope_base, totals)

    def _write(self, label: str, step: int, rope_base: float, totals: np.ndarray) -> None:
        losses = [nll / tokens if tokens else None for nll, tokens in totals.T]
        saved = read_position_losses(self._path.parent) or {"measurements": []}
        kept = [entry for entry in saved["measurements"] if entry["label"] != label]
        entry = {"label": label, "step": step, "rope_base": rope_base, "loss": losses}
        saved = {
            "position_below": self._ends_N.tolist(),
            "target_tokens": totals[1].astype(int).tolist(),
            "measurements": [*kept, entry],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(saved, indent=2) + "\n")
        partial.replace(self._path)


def read_position_losses(workdir: Path) -> dict[str, Any] | None:
    """What a run measured, or None: the ends of the ranges, target tokens in each, and a loss in nats for each."""
    path = workdir / POSITION_LOSS
    return json.loads(path.read_text()) if path.exists() else None


def describe_position_losses(saved: dict[str, Any]) -> str:
    """The first and the last measurement in words: over all tokens, and over those of the farthest range."""
    tokens_N = np.asarray(saved["target_tokens"])
    measured = [np.array([loss or 0.0 for loss in entry["loss"]]) for entry in saved["measurements"]]
    overall = " to ".join(f"{np.average(loss_N, weights=tokens_N):.4f}" for loss_N in (measured[0], measured[-1]))
    farthest = np.flatnonzero(tokens_N)[-1]
    far = " to ".join(f"{loss_N[farthest]:.4f}" for loss_N in (measured[0], measured[-1]))
    start = saved["position_below"][farthest - 1] if farthest else 0
    return f"{overall} nats a token on the same rows, {far} from position {start:,} on"
