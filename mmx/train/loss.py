"""The training objective of a batch, as sums over tokens so that micro-batches add up exactly.

Shapes: B batch, S tokens, D hidden, L layers, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mmx.config import ModelConfig
from mmx.model.experts import ExpertStats
from mmx.model.layout import stream_axes
from mmx.model.router import auxiliary_loss
from mmx.model.text import Params, TextModel, bind
from mmx.parallel import axis_size, constrain, gather_in_island, island, stored_axes
from pallas_kernels.cross_entropy import cross_entropy


class Batch(NamedTuple):
    """Packed rows, [B, S] each; on a mesh, tokens in the order of ``mmx.parallel.sequence_layout``."""

    tokens_BS: jax.Array  # int32
    targets_BS: jax.Array  # int32, the next token of the same document
    segment_ids_BS: jax.Array  # int32, 0 where there is padding only
    positions_BS: jax.Array  # int32, from the start of the document's part in the row
    weights_BS: jax.Array  # fp32, 0 where there is no target
    # int32, slices of each row in the order of the ranks that hold them; only where the layout differs among rows.
    slice_ids_BT: jax.Array | None = None


class LossSums(NamedTuple):
    """Sums over a batch's tokens; dividing by ``tokens`` gives means."""

    nll: jax.Array  # negative log-likelihood, nats
    tokens: jax.Array  # sum of the weights
    stats: ExpertStats  # times ``tokens``


def loss_sums(config: ModelConfig, params: Params, batch: Batch, *, dropless: bool) -> tuple[jax.Array, LossSums]:
    """The objective times the number of target tokens, and its parts.

    Its gradient is a token-sum gradient: adding those of micro-batches and dividing by all their tokens weighs every
    target token alike, however unequal the documents' masks are. The auxiliary loss, a mean over a micro-batch, is
    weighted by the micro-batch's tokens.
    """
    model = bind(config, params)
    x_BSD, stats, _ = model(
        batch.tokens_BS,
        segment_ids_BS=batch.segment_ids_BS,
        positions_BS=batch.positions_BS,
        slice_ids_BT=batch.slice_ids_BT,
        valid_BS=batch.segment_ids_BS > 0,
        dropless=dropless,
    )
    nll = next_token_nll(model, x_BSD, batch.targets_BS, batch.weights_BS)
    tokens = jnp.sum(batch.weights_BS)
    auxiliary = config.aux_loss_coefficient * auxiliary_loss(stats.load, config.aux_loss_form)
    return nll + tokens * auxiliary, LossSums(nll, tokens, jax.tree.map(lambda x: tokens * x, stats))


def next_token_nll(model: TextModel, x_BSD: jax.Array, targets_BS: jax.Array, weights_BS: jax.Array) -> jax.Array:
    """Weighted sum of the target tokens' negative log-likelihoods, without ever holding all logits."""
    head = model.head_parameter
    axes = head.get_metadata("axes")
    logits_dtype = model.logits_dtype(x_BSD.dtype)

    def local_sum(x_BSD, head_VD, targets_BS, weights_BS):
        vocab_axis = "tensor" if axis_size("tensor") > 1 else None
        if vocab_axis:
            # Every device of ``tensor`` has a part of the vocabulary and scores all the group's tokens with it.
            x_BSD = lax.all_gather(x_BSD, vocab_axis, axis=1, tiled=True)
        x_TD, targets_T, weights_T = x_BSD.reshape(-1, x_BSD.shape[-1]), targets_BS.reshape(-1), weights_BS.reshape(-1)
        head_VD = gather_in_island(head_VD, axes, x_TD.dtype)
        total = cross_entropy(x_TD, head_VD, targets_T, weights_T, logits_dtype=logits_dtype, vocab_axis=vocab_axis)
        return total.reshape(1, 1)

    tokens = ("batch", "attention_sequence")
    run = island(local_sum, (stream_axes(3), stored_axes(axes), tokens, tokens), tokens)
    return constrain(jnp.sum(run(x_BSD, head[...], targets_BS, weights_BS)))
