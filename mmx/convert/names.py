"""The one table of names: where each of our parameters lies in a PyTorch checkpoint. Both directions read it.

Axes are written as in einops: letters are the sizes below, parentheses pack several axes into one, ``1/3`` is index 1
of an axis of 3 (a part of something packed), and ``{E}`` in a tensor's name is one tensor an expert. So a row gives
names, shapes, transposition, packing and stacking at once.

Axes: V vocabulary, D hidden, H heads, G key-value heads, K head channels, C = H * K, E experts, F expert hidden.
Source: the released checkpoint's index, and what Transformers' ``MiniMaxForCausalLM`` holds in memory.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mmx.config import LIGHTNING, SOFTMAX, ModelConfig
from mmx.model.text import layer_runs

Path = tuple[str, ...]

# Which layers a row belongs to, besides LIGHTNING and SOFTMAX.
MODEL, LAYER = "model", "layer"
# How the experts are spelt: the released files' one tensor an expert and matrix (which Transformers writes too), or one
# tensor a layer, as Transformers holds them in memory.
SEPARATE, FUSED = "separate", "fused"


class Row(NamedTuple):
    """One correspondence. A parameter's own axes exclude the stacked periods and layers in front of them."""

    where: str
    parameter: str
    parameter_axes: str
    tensor: str
    tensor_axes: str
    spelling: str | None = None  # None: both


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = "model.layers.{number}."
_EXPERT = "block_sparse_moe.experts.{E}."

TABLE = (
    Row(MODEL, "embedding", "V D", EMBEDDING, "V D"),
    Row(LAYER, "attention_norm.scale", "D", "input_layernorm.weight", "D"),
    Row(LIGHTNING, "attention.query", "D H K", "self_attn.qkv_proj.weight", "(H 0/3 K) D"),
    Row(LIGHTNING, "attention.key", "D H K", "self_attn.qkv_proj.weight", "(H 1/3 K) D"),
    Row(LIGHTNING, "attention.value", "D H K", "self_attn.qkv_proj.weight", "(H 2/3 K) D"),
    Row(LIGHTNING, "attention.gate", "D H K", "self_attn.output_gate.weight", "(H K) D"),
    Row(LIGHTNING, "attention.norm.scale", "C", "self_attn.norm.weight", "C"),
    Row(LIGHTNING, "attention.out", "H K D", "self_attn.out_proj.weight", "D (H K)"),
    Row(SOFTMAX, "attention.query", "D H K", "self_attn.q_proj.weight", "(H K) D"),
    Row(SOFTMAX, "attention.key", "D G K", "self_attn.k_proj.weight", "(G K) D"),
    Row(SOFTMAX, "attention.value", "D G K", "self_attn.v_proj.weight", "(G K) D"),
    Row(SOFTMAX, "attention.out", "H K D", "self_attn.o_proj.weight", "D (H K)"),
    Row(LAYER, "experts_norm.scale", "D", "post_attention_layernorm.weight", "D"),
    Row(LAYER, "experts.router.gate", "D E", "block_sparse_moe.gate.weight", "E D", SEPARATE),
    Row(LAYER, "experts.gate_up", "E D 0/2 F", _EXPERT + "w1.weight", "F D", SEPARATE),
    Row(LAYER, "experts.gate_up", "E D 1/2 F", _EXPERT + "w3.weight", "F D", SEPARATE),
    Row(LAYER, "experts.down", "E F D", _EXPERT + "w2.weight", "D F", SEPARATE),
    Row(LAYER, "experts.router.gate", "D E", "mlp.gate.weight", "E D", FUSED),
    Row(LAYER, "experts.gate_up", "E D 2 F", "mlp.experts.gate_up_proj", "E (2 F) D", FUSED),
    Row(LAYER, "experts.down", "E F D", "mlp.experts.down_proj", "E D F", FUSED),
    Row(MODEL, "final_norm.scale", "D", "model.norm.weight", "D"),
    Row(MODEL, "head", "V D", HEAD, "V D"),
)

_ROUTERS = tuple(row.tensor for row in TABLE if row.parameter == "experts.router.gate")
# What some checkpoints hold besides weights: constants that the classes compute themselves.
DERIVED_TENSORS = re.compile(
    r"\.(self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)|(self_attn\.)?rotary_emb\.inv_freq)$"
)


class Part(NamedTuple):
    """A box of one parameter and where it lies in one tensor.

    The tensor, reshaped to ``view``, holds the box at ``fixed`` along the axes that have an index there, and along
    parameter axis ``axes[i]`` on the others.
    """

    path: Path  # of the parameter
    start: tuple[int, ...]  # the box within the parameter, stacked axes [P, R] included
    extent: tuple[int, ...]
    tensor: str
    view: tuple[int, ...]
    axes: tuple[int | None, ...]  # one a view axis
    fixed: tuple[int | None, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Parameter axes in the order in which the tensor has them."""
        return tuple(axis for axis in self.axes if axis is not None)


class Tensor(NamedTuple):
    """One tensor of a checkpoint and the parameters that it is made of."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensors(config: ModelConfig, spelling: str = SEPARATE) -> Iterator[Tensor]:
    """All tensors of a model's checkpoint, in the order of the layers."""
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "K": config.head_dim,
        "C": config.num_heads * config.head_dim,
        "E": config.num_experts,
        "F": config.expert_hidden_size,
    }
    rows = [row for row in TABLE if row.spelling in (None, spelling)]
    model_rows = [row for row in rows if row.where == MODEL and not (row.parameter == "head" and config.tie_embeddings)]
    yield from _gather(model_rows[:1], sizes)
    for number, kind in enumerate(config.layer_pattern):
        run, place = _place(config.layer_pattern, number)
        layer_rows = [row for row in rows if row.where in (LAYER, kind)]
        yield from _gather(layer_rows, sizes, _LAYER.format(number=number), ("runs", run), place)
    yield from _gather(model_rows[1:], sizes)


def parts_by_parameter(config: ModelConfig, spelling: str = SEPARATE) -> dict[Path, list[Part]]:
    """The same, by parameter: the boxes of each one and where they are found."""
    found: dict[Path, list[Part]] = {}
    for tensor in tensors(config, spelling):
        for part in tensor.parts:
            found.setdefault(part.path, []).append(part)
    return found


def spelling_of(names: Iterable[str]) -> str:
    """How the experts of a checkpoint with these tensors are spelt."""
    fused = tuple(row.tensor for row in TABLE if row.spelling == FUSED)
    return FUSED if any(name.endswith(fused) for name in names) else SEPARATE


def is_router(tensor: str) -> bool:
    """Whether a tensor is a router's matrix, which is fp32 on disk whatever the others are."""
    return tensor.endswith(_ROUTERS)


def slope_tensors(config: ModelConfig) -> dict[str, int]:
    """Names under which Transformers stores the slopes of lightning layers, and the layers' numbers."""
    numbers = (number for number, kind in enumerate(config.layer_pattern) if kind == LIGHTNING)
    return {_LAYER.format(number=number) + "self_attn.slope_rate": number for number in numbers}


def _gather(
    rows: list[Row],
    sizes: dict[str, int],
    prefix: str = "",
    path: Path = (),
    place: tuple[int, ...] = (),
) -> Iterator[Tensor]:
    """Tensors of some rows, those of one expert after another, the parts of a packed one together."""
    names: dict[str, list[tuple[Row, int | None]]] = {}
    plain = [row for row in rows if "{E}" not in row.tensor]
    stacked = [row for row in rows if "{E}" in row.tensor]
    for row in plain:
        names.setdefault(row.tensor, []).append((row, None))
    for expert in range(sizes["E"]):
        for row in stacked:
            names.setdefault(row.tensor.replace("{E}", str(expert)), []).append((row, expert))
    for name, members in names.items():
        parts = [_part(row, expert, sizes, prefix + name, path, place) for row, expert in members]
        yield Tensor(prefix + name, _packed_shape(members[0][0].tensor_axes, sizes), tuple(parts))


def _part(row: Row, expert: int | None, sizes: dict[str, int], name: str, path: Path, place: tuple[int, ...]) -> Part:
    parameter_axes, tensor_axes = _axes(row.parameter_axes), _axes(row.tensor_axes)
    start, extent, order = list(place), [1] * len(place), {}
    for axis in parameter_axes:
        if "/" in axis or (axis == "E" and expert is not None):
            start.append(int(axis.split("/")[0]) if "/" in axis else expert)
            extent.append(1)
        else:
            order[axis] = len(start)
            start.append(0)
            extent.append(_size(axis, sizes))
    return Part(
        path=(*path, *row.parameter.split(".")),
        start=tuple(start),
        extent=tuple(extent),
        tensor=name,
        view=tuple(_size(axis, sizes) for axis in tensor_axes),
        axes=tuple(order.get(axis) for axis in tensor_axes),
        fixed=tuple(int(axis.split("/")[0]) if "/" in axis else None for axis in tensor_axes),
    )


@functools.cache
def _place(pattern: tuple[str, ...], number: int) -> tuple[str, tuple[int, int]]:
    """Name of the run that a layer belongs to, and its indices [P, R] in it."""
    periods, runs = layer_runs(pattern)
    period, within = divmod(number, len(pattern) // periods)
    run = next(run for run in runs if run.start <= within < run.start + run.length)
    return run.name, (period, within - run.start)


def _axes(axes: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\s()]+", axes))


def _size(axis: str, sizes: dict[str, int]) -> int:
    count = axis.split("/")[-1]
    return int(count) if count.isdigit() else sizes[count]


def _packed_shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Sizes of a tensor's dimensions, what is in parentheses being one of them."""
    dimensions = re.findall(r"\([^)]*\)|[^\s()]+", axes)
    return tuple(math.prod(_size(axis, sizes) for axis in _axes(dimension)) for dimension in dimensions)
