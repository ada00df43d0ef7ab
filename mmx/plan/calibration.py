"""How honest the predictions are: the same predictor on training steps whose speed others published.

Two steps of ours in the shapes of models that MaxText trains on v5p, beside the MFU that it reports for them
(github.com/AI-Hypercomputer/maxtext, the page on tiering; 2025). The programs are ours: our model with softmax
attention in every layer and pre-norm residuals, our sharding, full rematerialisation. So the ratio holds all that lies
between a prediction of ours and a measurement of theirs: the predictor's optimism, and the difference between the
programs. The dense model is ours with one expert that every token goes to.

``calibration.json`` holds what ``python -m launch.plan --calibrate`` found.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from mmx.config import SOFTMAX, DataConfig, MeshConfig, ModelConfig, Run

TABLE = Path(__file__).with_name("calibration.json")


@dataclasses.dataclass(frozen=True)
class Published:
    """A training step that others measured."""

    name: str
    topology: str
    mfu: float
    run: Run


def published() -> tuple[Published, ...]:
    """The steps to predict."""
    llama = ModelConfig(
        vocab_size=32_000,
        hidden_size=8192,
        num_layers=80,
        layer_pattern=(SOFTMAX,) * 80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        rotary_dim=128,
        num_experts=1,
        experts_per_token=1,
        expert_hidden_size=28_672,
        capacity_factor=1.0,
        postnorm=False,
        aux_loss_coefficient=0.0,
        dtype="bfloat16",
        remat="full",
    )
    mixtral = dataclasses.replace(
        llama,
        hidden_size=4096,
        num_layers=32,
        layer_pattern=(SOFTMAX,) * 32,
        num_heads=32,
        num_experts=8,
        experts_per_token=2,
        expert_hidden_size=14_336,
        aux_loss_coefficient=0.01,
        exchange_groups=4,
    )
    return (
        # 256 in the name of a v5p slice counts TensorCores: 128 chips.
        Published("Mixtral-8x7B", "v5p:4x4x8", 0.526, _run(mixtral, MeshConfig(fsdp=16, expert=8), 128 * 8)),
        Published("Llama-2-70B", "v5p:8x8x8", 0.654, _run(llama, MeshConfig(fsdp=512), 512 * 4)),
    )


def honesty() -> list[dict]:
    """What the last calibration found: a name, the published and the predicted MFU, and their ratio."""
    return json.loads(TABLE.read_text())["steps"] if TABLE.exists() else []


def factor() -> float | None:
    """The mean ratio of published to predicted MFU: below 1 the predictor promises too much, above 1 too little."""
    ratios = [step["ratio"] for step in honesty()]
    return sum(ratios) / len(ratios) if ratios else None


def save(steps: list[dict], compiler: str) -> None:
    """Writes the table."""
    TABLE.write_text(json.dumps({"compiler": compiler, "steps": steps}, indent=2) + "\n")


def _run(model: ModelConfig, mesh: MeshConfig, rows: int) -> Run:
    return Run(model=model, mesh=mesh, data=DataConfig(sequence_length=4096, batch_size=rows))
