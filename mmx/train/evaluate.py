"""Held-out loss, in nats a token and in bits a byte of text (which does not depend on the tokenizer)."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmx.config import ModelConfig
from mmx.model.text import Params, bind
from mmx.train.loss import Batch, next_token_nll


class HeldoutSums(NamedTuple):
    """Sums over a batch's target tokens."""

    nll: jax.Array  # nats
    tokens: jax.Array
    text_bytes: jax.Array


class HeldoutLoss(NamedTuple):
    """Loss over all held-out rows."""

    nats_per_token: float
    bits_per_byte: float


def heldout_sums(config: ModelConfig, params: Params, batch: Batch, token_bytes_V: jax.Array) -> HeldoutSums:
    """Sums of one batch, without dropping tokens; ``token_bytes_V`` is each token's length as text, in bytes."""
    model = bind(config, params)
    x_BSD, _, _ = model(
        batch.tokens_BS,
        segment_ids_BS=batch.segment_ids_BS,
        positions_BS=batch.positions_BS,
        slice_ids_BT=batch.slice_ids_BT,
    )
    nll = next_token_nll(model, x_BSD, batch.targets_BS, batch.weights_BS)
    text_bytes_BS = token_bytes_V.at[batch.targets_BS].get(out_sharding=_sharding(batch.targets_BS))
    return HeldoutSums(nll, jnp.sum(batch.weights_BS), jnp.sum(batch.weights_BS * text_bytes_BS))


def heldout_loss(sums: Callable[[Batch], HeldoutSums], batches: Iterable[Batch]) -> HeldoutLoss:
    """Folds ``sums`` over the batches, on the host in double precision."""
    totals = [0.0, 0.0, 0.0]
    for batch in batches:
        totals = [total + float(part) for total, part in zip(totals, sums(batch), strict=True)]
    nll, tokens, text_bytes = totals
    return HeldoutLoss(nll / tokens, nll / math.log(2) / text_bytes)


def _sharding(x: jax.Array):
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding
