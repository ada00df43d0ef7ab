"""Parameters and training FLOPs of a model, counted from its configuration alone.

Conventions. A multiply-add is two FLOPs; matrix products only (norms, softmax, SiLU and the router's softmax are
left out). Softmax attention is causal within each document: a document of n tokens costs n(n+1)/2 query-key pairs.
Lightning attention is counted in its recurrent form, whose cost does not depend on an implementation's block: one
rank-one update of the K x V state and one product with it, per head and token. Training is three times the forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mmx.config.model import LIGHTNING, ModelConfig


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters by part of the model, summed over layers. A tied head has none of its own."""

    embedding: int
    head: int
    lightning_attention: int
    softmax_attention: int
    router: int
    experts: int
    norms: int
    # Share of the experts' parameters that a token passes through.
    experts_active: int

    @property
    def total(self) -> int:
        """All parameters, both embedding tables included."""
        return self.embedding + self.head + self._body + self.experts

    @property
    def active(self) -> int:
        """Parameters a token passes through, without the two embedding tables (as the report counts 45.9B)."""
        return self._body + self.experts_active

    @property
    def _body(self) -> int:
        return self.lightning_attention + self.softmax_attention + self.router + self.norms


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass by part of the model."""

    projections: int
    lightning_state: int
    softmax_scores: int
    router: int
    experts: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.asdict(self).values())


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts parameters; the released configuration gives 456,089,655,296 in total."""
    num_lightning, num_softmax = _layers(model)
    width = model.num_heads * model.head_dim
    table = model.vocab_size * model.hidden_size
    expert = 3 * model.hidden_size * model.expert_hidden_size
    return ParameterCount(
        embedding=table,
        head=0 if model.tie_embeddings else table,
        lightning_attention=num_lightning * (_lightning_projections(model) + width),
        softmax_attention=num_softmax * _softmax_projections(model),
        router=model.num_layers * model.hidden_size * model.num_experts,
        experts=model.num_layers * model.num_experts * expert,
        norms=(2 * model.num_layers + 1) * model.hidden_size,
        experts_active=model.num_layers * model.experts_per_token * expert,
    )


def forward_flops(model: ModelConfig, document_lengths: Sequence[int]) -> ForwardFlops:
    """FLOPs of a forward pass over documents of the given lengths (tokens), however they are packed."""
    num_lightning, num_softmax = _layers(model)
    tokens = sum(document_lengths)
    pairs = sum(length * (length + 1) // 2 for length in document_lengths)
    projections = num_lightning * _lightning_projections(model) + num_softmax * _softmax_projections(model)
    counts = count_parameters(model)
    return ForwardFlops(
        projections=2 * tokens * projections,
        lightning_state=num_lightning * tokens * model.num_heads * 4 * model.head_dim**2,
        softmax_scores=num_softmax * pairs * model.num_heads * 4 * model.head_dim,
        router=2 * tokens * counts.router,
        experts=2 * tokens * counts.experts_active,
        head=2 * tokens * model.vocab_size * model.hidden_size,
    )


def training_flops(model: ModelConfig, document_lengths: Sequence[int]) -> int:
    """Model FLOPs of a training step over the documents: forward plus a backward of twice its cost."""
    return 3 * forward_flops(model, document_lengths).total


def _layers(model: ModelConfig) -> tuple[int, int]:
    num_lightning = sum(kind == LIGHTNING for kind in model.layer_pattern)
    return num_lightning, len(model.layer_pattern) - num_lightning


def _lightning_projections(model: ModelConfig) -> int:
    # Query, key, value, output gate and output projection, each hidden_size x width.
    return 5 * model.hidden_size * model.num_heads * model.head_dim


def _softmax_projections(model: ModelConfig) -> int:
    return 2 * model.hidden_size * (model.num_heads + model.num_kv_heads) * model.head_dim
