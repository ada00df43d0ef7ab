"""The text model: embedding, the stack of layers, final norm and head.

The stack is two nested scans: over repetitions of the layer pattern's smallest period, and inside a period over each
run of layers of one kind. Parameters of a run are stacked [P periods, R layers of the run, ...], so compile time does
not grow with depth and any pattern is the same code.

Shapes: B batch, S tokens, T cache slots, D hidden, V vocabulary, H heads, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mmx.config import ModelConfig
from mmx.model.block import Block, Step, Tokens
from mmx.model.experts import ExpertStats
from mmx.model.layout import stream_axes
from mmx.model.norm import RMSNorm
from mmx.model.parameters import weight, xavier
from mmx.model.rope import rope_table
from mmx.parallel import axis_size, constrain, gather_in_island, island, parameter_spec, stored_axes
from mmx.parallel.axes import GATHERED_WEIGHT
from mmx.parallel.lasp import ENTERING_STATES
from mmx.parallel.ring import RING_RESIDUALS
from pallas_kernels.lightning_attention import LIGHTNING_STATES, layer_slopes
from pallas_kernels.segments import document_positions
from pallas_kernels.softmax_attention import SOFTMAX_RESIDUALS

Params = dict[str, Any]

_TABLE = ("vocab", "hidden")
# What attention leaves for its backward pass besides queries, keys and values: with it, nothing is sent twice.
_ATTENTION_RESULTS = ["attention", LIGHTNING_STATES, ENTERING_STATES, RING_RESIDUALS, SOFTMAX_RESIDUALS]


class LayerRun(NamedTuple):
    """Consecutive layers of one kind within a period."""

    name: str
    kind: str
    start: int  # index of its first layer within the period
    length: int


def layer_runs(pattern: tuple[str, ...]) -> tuple[int, tuple[LayerRun, ...]]:
    """Splits a layer pattern into its number of periods and the runs of one period."""
    total = len(pattern)
    period = next(n for n in range(1, total + 1) if total % n == 0 and pattern[:n] * (total // n) == tuple(pattern))
    runs, start = [], 0
    for index, (kind, group) in enumerate(groupby(pattern[:period])):
        length = len(list(group))
        runs.append(LayerRun(f"{index}_{kind}", kind, start, length))
        start += length
    return total // period, tuple(runs)


class TextModel(nnx.Module):
    """The language model, without any state: parameters in, activations out."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config = dataclasses.replace(config)
        V, D = config.vocab_size, config.hidden_size
        embedding_key, head_key, *layer_keys = jax.random.split(key, 2 + config.num_layers)
        table = functools.partial(xavier, shape=(V, D), axes=_TABLE, dtype=config.param_dtype)
        self.embedding = table(embedding_key, fan_in=V, fan_out=D)
        self.head = None if config.tie_embeddings else table(head_key, fan_in=D, fan_out=V)
        self.final_norm = RMSNorm(D, config.norm_eps, config.param_dtype)

        periods, runs = layer_runs(config.layer_pattern)
        layer_keys = jnp.stack(layer_keys).reshape(periods, config.num_layers // periods, *key.shape)
        self.runs = nnx.Dict(
            {
                run.name: jax.vmap(jax.vmap(functools.partial(Block, config, run.kind)))(
                    layer_keys[:, run.start : run.start + run.length]
                )
                for run in runs
            }
        )

    def __call__(
        self,
        tokens_BS: jax.Array,
        *,
        segment_ids_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
        slice_ids_BT: jax.Array | None = None,
        valid_BS: jax.Array | None = None,
        dropless: bool = True,
        keep_cache: bool = False,
    ) -> tuple[jax.Array, ExpertStats, dict[str, Any] | None]:
        """Final hidden states of whole rows.

        Args:
          tokens_BS: int32 token ids.
          segment_ids_BS: document ids; a document begins wherever the id changes. None: one document a row.
          positions_BS: positions for RoPE; None counts from the start of each document.
          slice_ids_BT: slices of each row in the order of the ranks of ``context``, in a layout that depends on the
            documents; None otherwise.
          valid_BS: bool, tokens that count for the router's load; None counts all.
          dropless: False lets experts drop tokens beyond ``config.capacity_factor``, as in training.
          keep_cache: also return what decoding continues from.

        Returns:
          Normalised hidden states [B, S, D]; the experts' statistics with a leading layer dimension; and the cache of
          each run, stacked [P, R, B, ...], or None.
        """
        config = self.config
        if axis_size("context") > 1 and (positions_BS is None or keep_cache):
            raise ValueError("rows split over context need their positions given, and leave no cache")
        if positions_BS is None:
            whole_BS = jnp.zeros_like(tokens_BS) if segment_ids_BS is None else segment_ids_BS
            positions_BS = document_positions(whole_BS)
        positions_BS = constrain(positions_BS, "batch", "attention_sequence")
        rope = rope_table(positions_BS, config.rotary_dim, config.rope_base)
        valid_BS = None if valid_BS is None else constrain(valid_BS, "batch", "sequence")
        tokens = Tokens(rope, segment_ids_BS, slice_ids_BT, valid_BS)

        def layer(x_BSD, inputs):
            block, slopes_H = inputs
            x_BSD, stats, cache = block(x_BSD, slopes_H, tokens, dropless=dropless)
            return x_BSD, (stats, cache if keep_cache else None)

        x_BSD, outputs = self._scan(_remat(layer, config.remat), self._embed(tokens_BS))
        stats = self._in_layer_order({name: stats for name, (stats, _) in outputs.items()})
        cache = {name: cache for name, (_, cache) in outputs.items()} if keep_cache else None
        return self.final_norm(x_BSD), stats, cache

    def step(
        self, token_B: jax.Array, cache: dict[str, Any], slot: jax.Array, position_B: jax.Array, valid_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """One token of each row.

        Args:
          token_B: the tokens.
          cache: from ``__call__`` or an earlier step, its key-value slots padded to T.
          slot: key-value slot of the token, the same for all rows, int32 scalar.
          position_B: the token's position in its document.
          valid_BT: slots that the token may see, its own included.

        Returns:
          Normalised hidden states [B, D] and the cache after the token.
        """
        config = self.config
        step = Step(rope_table(position_B, config.rotary_dim, config.rope_base), slot, valid_BT)

        def layer(x_BD, inputs):
            block, slopes_H, cache = inputs
            return block.step(x_BD, slopes_H, cache, step)

        x_BD, cache = self._scan(layer, self._embed(token_B), cache)
        return self.final_norm(x_BD), cache

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits [..., V] of hidden states [..., D], fp32 (rounded to the activations' dtype unless logits_fp32)."""
        dtype = jnp.promote_types(jnp.float32, x.dtype)
        if x.ndim == 3:
            x = constrain(x, "batch", "attention_sequence", None)
        logits = jnp.einsum("...d,vd->...v", x, self.head_weight(x.dtype), preferred_element_type=dtype)
        return logits.astype(self.logits_dtype(x.dtype)).astype(dtype)

    def head_weight(self, dtype: jnp.dtype) -> jax.Array:
        """The output embedding [V, D]; the input embedding if they are tied."""
        return weight(self.head_parameter, dtype)

    @property
    def head_parameter(self) -> nnx.Param:
        """The parameter that holds the output embedding."""
        return self.embedding if self.head is None else self.head

    def logits_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """What logits are rounded to, for activations of ``dtype``."""
        return jnp.promote_types(jnp.float32, dtype) if self.config.logits_fp32 else dtype

    def _embed(self, tokens: jax.Array) -> jax.Array:
        lookup = island(
            functools.partial(_lookup, jnp.dtype(self.config.dtype)),
            (stored_axes(_TABLE), ("batch", "attention_sequence") if tokens.ndim == 2 else ("batch",)),
            stream_axes(tokens.ndim + 1),
        )
        return lookup(self.embedding[...], tokens)

    def _scan(self, layer: Callable, x: jax.Array, *per_run: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Runs ``layer(x, (block, slopes, *inputs)) -> (x, outputs)`` over all layers; outputs by run, [P, R, ...]."""
        config = self.config
        periods, runs = layer_runs(config.layer_pattern)
        L, rule = config.num_layers, config.slope_rule
        slopes_LH = np.stack([layer_slopes(config.num_heads, n, L, rule) for n in range(L)])
        slopes_PLH = slopes_LH.reshape(periods, -1, config.num_heads)

        def period(x, inputs):
            outputs = {}
            for run in runs:
                x, outputs[run.name] = lax.scan(layer, x, inputs[run.name])
            return x, outputs

        inputs = {
            run.name: (
                self.runs[run.name],
                jnp.asarray(slopes_PLH[:, run.start : run.start + run.length]),
                *(values[run.name] for values in per_run),
            )
            for run in runs
        }
        return lax.scan(period, x, inputs)

    def _in_layer_order(self, by_run: dict[str, Any]) -> Any:
        """Leaves stacked [P, R, ...] by run to leaves [L, ...]."""
        _, runs = layer_runs(self.config.layer_pattern)

        def join(*leaves):
            joined = jnp.concatenate(leaves, axis=1)
            return joined.reshape(-1, *joined.shape[2:])

        return jax.tree.map(join, *(by_run[run.name] for run in runs))


def _lookup(dtype: jnp.dtype, table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """Embeddings of one device's tokens. Each device of ``tensor`` has a part of the vocabulary and adds its rows."""
    table_VD = gather_in_island(table_VD, _TABLE, dtype)
    if axis_size("tensor") == 1:
        return table_VD[tokens]
    V = table_VD.shape[0]
    mine = tokens - lax.axis_index("tensor") * V
    x = table_VD.at[jnp.where((mine >= 0) & (mine < V), mine, V)].get(mode="fill", fill_value=0)
    return lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True) if x.ndim == 3 else lax.psum(x, "tensor")


def _remat(layer: Callable, policy: str) -> Callable:
    """Wraps a layer so that its backward pass recomputes what the policy does not keep; gathered weights never stay."""
    if policy == "none" and jax.sharding.get_abstract_mesh().empty:
        return layer  # Nothing was gathered, so there is nothing to leave out.
    policies = {
        "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED_WEIGHT),
        "selective": jax.checkpoint_policies.save_only_these_names("routing", *_ATTENTION_RESULTS),
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["routing"],
            names_which_can_be_offloaded=_ATTENTION_RESULTS,
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    # Inside a scan nothing outside the layer could be merged with its recomputation.
    return jax.checkpoint(layer, policy=policies[policy], prevent_cse=False)


@functools.cache
def _abstract(config: ModelConfig) -> tuple[Any, nnx.State]:
    """Graph definition and parameter shapes, without making any array."""
    return nnx.split(jax.eval_shape(lambda: TextModel(config, jax.random.key(0))))


def bind(config: ModelConfig, params: Params) -> TextModel:
    """The model over the given parameters, a nested dictionary of arrays."""
    graphdef, _ = _abstract(dataclasses.replace(config))
    return nnx.merge(graphdef, nnx.State(params))


def parameter_specs(config: ModelConfig) -> Params:
    """How each parameter lies on the mesh at rest, as a nested dictionary of partition specs."""
    _, state = _abstract(dataclasses.replace(config))
    is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
    specs = jax.tree.map(lambda p: parameter_spec(p.get_metadata("axes"), p.get_value().ndim), state, is_leaf=is_param)
    return nnx.to_pure_dict(specs)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters as a nested dictionary of arrays, laid out on the mesh in scope. Call it under ``jax.jit``."""
    params = nnx.to_pure_dict(nnx.state(TextModel(config, key)))
    if jax.sharding.get_abstract_mesh().empty:
        return params
    return jax.tree.map(jax.reshard, params, parameter_specs(config))
