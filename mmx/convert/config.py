"""The config.json of a Hugging Face directory to our ModelConfig and back, with nothing lost in silence.

Two layouts exist. "released" is that of MiniMax-Text-01 and MiniMax-M1, which need the modelling code beside the
weights; "transformers" is the ``minimax`` of Transformers itself. They hold the same tensors under the same names and
spell some fields differently; either spelling is read in either layout, since published directories mix them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmx.config import LIGHTNING, SOFTMAX, ConfigError, ModelConfig, from_dict, nearest

CONFIG = "config.json"
RELEASED, TRANSFORMERS = "released", "transformers"
LAYOUTS = (RELEASED, TRANSFORMERS)
_MODEL_TYPES = {"minimax_text_01": RELEASED, "MiniMaxText01": RELEASED, "minimax_m1": RELEASED, "minimax": TRANSFORMERS}

# Our field, and its name in each layout (one name where they agree).
_FIELDS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "num_experts": ("num_local_experts", "num_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "expert_hidden_size": ("intermediate_size",),
    "norm_eps": ("rms_norm_eps",),
    "tie_embeddings": ("tie_word_embeddings",),
    "aux_loss_coefficient": ("router_aux_loss_coef",),
}
# Released name first, Transformers' second.
_SCALES: dict[str, tuple[str, str]] = {
    f"{ours}_{which}": (f"layernorm_{released}_{which}", f"{transformers}_{which}_factor")
    for ours, released, transformers in (
        ("lightning", "linear_attention", "linear_attn"),
        ("softmax", "full_attention", "full_attn"),
        ("experts", "mlp", "mlp"),
    )
    for which in ("alpha", "beta")
}
# What the PyTorch classes take where a field is absent. Older versions of Transformers leave out what equals it; the
# sizes are its class's alone.
_DEFAULTS: dict[str, Any] = {
    "experts_per_token": 2,
    "norm_eps": 1e-5,
    "tie_embeddings": False,
    "aux_loss_coefficient": 0.001,
    **dict.fromkeys(_SCALES, 1.0),
}
_TRANSFORMERS_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "num_experts": 8,
    "expert_hidden_size": 14336,
}
_DEFAULT_ROPE_BASE = 1e6
# Fields in which only one value is the model we have.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "sliding_window": (None,),
    "router_jitter_noise": (0,),
    "shared_intermediate_size": (0, [0], None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# Fields that say nothing of what the model computes: identity, token ids, serving, initialisation, and the block that
# the PyTorch code splits lightning attention into, on which its result does not depend. The mode of a shared expert
# means nothing without one. They are carried along to an export of the same model.
INERT = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "license", "language"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "tokenizer_class", "prefix"),
        *("use_cache", "max_position_embeddings", "max_model_len", "initializer_range", "dtype", "torch_dtype"),
        *("output_router_logits", "output_attentions", "output_hidden_states", "return_dict", "torchscript"),
        *("id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task", "is_decoder"),
        *("_attn_implementation", "attn_implementation", "chunk_size_feed_forward", "low_cpu_mem_usage"),
        *("block", "block_size", "shared_moe_mode", "use_bfloat16"),
    )
)


@dataclasses.dataclass(frozen=True)
class Translation:
    """What a config.json says."""

    model: ModelConfig
    layout: str
    inert: dict[str, Any]  # what it says besides, as it stands there


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a directory's config.json.

    Raises:
      ConfigError: if there is none, or it is not of this family.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} holds no checkpoint: it has no {CONFIG}")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error})") from None
    kind = fields.get("model_type") if isinstance(fields, dict) else fields
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        raise ConfigError(
            f"{path} has model_type {kind!r}, which is not of the MiniMax-01 text family ({', '.join(_MODEL_TYPES)})"
        )
    return fields


def is_huggingface(folder: Path) -> bool:
    """Whether a directory looks like a Hugging Face checkpoint, whole or not."""
    names = {path.name for path in folder.iterdir()}
    if any(name.endswith((".safetensors", ".safetensors.index.json")) or "pytorch_model" in name for name in names):
        return True
    try:
        fields = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and "model_type" in fields  # A run's config.json has none.


def from_huggingface(fields: dict[str, Any], where: str = CONFIG) -> Translation:
    """Translates a config.json; what it does not say is as the PyTorch classes have it.

    ``dtype`` and ``param_dtype`` follow its dtype; the tensors may know better (``mmx.convert.load``).

    Raises:
      ConfigError: for a field that is unknown, contradicts another, or asks for what the model has not, by its name.
    """
    try:
        return _translate(fields, where)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} has a field of the wrong type ({error})") from None


def _translate(fields: dict[str, Any], where: str) -> Translation:
    layout = _MODEL_TYPES[fields["model_type"]]
    take = _Taking(fields, where)
    defaults = _DEFAULTS | (_TRANSFORMERS_DEFAULTS if layout == TRANSFORMERS else {})
    values: dict[str, Any] = {}
    for ours, names in (_FIELDS | _SCALES).items():
        value = take(*names, default=defaults.get(ours))
        if value is None and ours != "head_dim":
            raise ConfigError(f"{where} lacks {names[0]!r}")
        values[ours] = value
    if values["head_dim"] is None:
        values["head_dim"] = values["hidden_size"] // values["num_heads"]
    values["layer_pattern"] = _pattern(take, values["num_layers"], layout)
    values |= _rope(take, values["head_dim"])
    values["postnorm"] = take("postnorm", default=layout == TRANSFORMERS)
    if layout == TRANSFORMERS and not values["postnorm"]:
        raise ConfigError(f"{where}: postnorm=false contradicts model_type 'minimax', whose class always has postnorm")
    # A directory of ours says whose slopes it has; others have those of the code that they are for.
    values["slope_rule"] = take("slope_rule", default=layout)
    dtype = "bfloat16" if take("dtype", "torch_dtype") == "bfloat16" else "float32"
    for name, allowed in _FIXED.items():
        value = take(name, default=allowed[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise ConfigError(f"{where}: {name}={value!r} is not supported, only {allowed[0]!r} is")
    take.finish()
    values |= {"aux_loss_form": "released", "dtype": dtype, "param_dtype": dtype}
    try:
        model = from_dict(values, ModelConfig)
        model.validate()
    except ConfigError as error:
        raise ConfigError(f"{where} describes no model: {error}") from None
    return Translation(model, layout, {name: value for name, value in fields.items() if name in INERT})


def to_huggingface(
    model: ModelConfig, layout: str, param_dtype: str, inert: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of a model.

    Args:
      layout: "released" or "transformers".
      param_dtype: of the tensors that go with it.
      inert: fields to carry along that say nothing of the arithmetic (``Translation.inert``).

    Raises:
      ConfigError: if the layout cannot say what the model is.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == TRANSFORMERS and not model.postnorm:
        raise ConfigError("Transformers' class has no pre-norm: write the released layout, whose postnorm can be false")
    if model.slope_rule != layout and model.num_heads & (model.num_heads - 1):
        raise ConfigError(
            f"model.slope_rule is {model.slope_rule!r} and the {layout} code computes other decay slopes for "
            f"{model.num_heads} heads: write the {model.slope_rule} layout"
        )
    released = layout == RELEASED
    identity = ("MiniMaxText01ForCausalLM", "minimax_text_01") if released else ("MiniMaxForCausalLM", "minimax")
    fields: dict[str, Any] = {"architectures": [identity[0]], "model_type": identity[1]}
    fields |= {names[0]: getattr(model, ours) for ours, names in _FIELDS.items()}
    if model.aux_loss_form != "released":  # The coefficient of another formula.
        del fields["router_aux_loss_coef"]
    for ours, names in _SCALES.items():
        branch, which = ours.split("_")
        fields[names[0 if released else 1]] = getattr(model, which)(branch)
    fields["hidden_act"] = "silu"
    is_softmax = [kind == SOFTMAX for kind in model.layer_pattern]
    if released:
        fields["attn_type_list"] = [int(one) for one in is_softmax]
        fields |= {"postnorm": model.postnorm, "shared_intermediate_size": 0, "rope_theta": model.rope_base}
    else:
        fields["layer_types"] = ["full_attention" if one else "linear_attention" for one in is_softmax]
        fields["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": model.rope_base,
            "partial_rotary_factor": model.rotary_dim / model.head_dim,
        }
    fields |= {"rotary_dim": model.rotary_dim, "slope_rule": model.slope_rule}
    fields["torch_dtype" if released else "dtype"] = param_dtype
    kept = {name: value for name, value in (inert or {}).items() if "dtype" not in name}
    if _MODEL_TYPES.get(kept.get("model_type")) != layout:  # Which code it was for is no longer true.
        kept = {name: value for name, value in kept.items() if name not in ("architectures", "model_type", "auto_map")}
    return fields | kept


class _Taking:
    """Fields that are taken one after another, so that what nobody took is known in the end."""

    def __init__(self, fields: dict[str, Any], where: str):
        self.where = where
        self._fields = fields
        self._taken: set[str] = set()

    def __call__(self, *names: str, default: Any = None) -> Any:
        """The value under any of the names. Raises ConfigError if two of them disagree."""
        self._taken |= set(names)
        given = {name: self._fields[name] for name in names if self._fields.get(name) is not None}
        return self.agree(given, default)

    def agree(self, given: dict[str, Any], default: Any) -> Any:
        """The one value of several fields that mean the same."""
        values = list(given.items())
        for name, value in values[1:]:
            if value != values[0][1]:
                raise ConfigError(
                    f"{self.where}: {values[0][0]}={_short(values[0][1])} and {name}={_short(value)} contradict each "
                    "other: remove one"
                )
        return values[0][1] if values else default

    def finish(self) -> None:
        """Raises ConfigError for the first field that nobody took."""
        for name in self._fields:
            if name not in self._taken and name not in INERT:
                raise ConfigError(
                    f"{self.where}: unknown field {name!r}, so what the model computes is not certain"
                    f"{nearest(name, self._taken)}"
                )


def _pattern(take: _Taking, num_layers: int, layout: str) -> tuple[str, ...]:
    numbers, words = take("attn_type_list"), take("layer_types")
    kinds = {}
    if numbers is not None:
        kinds["attn_type_list"] = _kinds(take, "attn_type_list", numbers, {0: LIGHTNING, 1: SOFTMAX})
    if words is not None:
        meaning = {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}
        kinds["layer_types"] = _kinds(take, "layer_types", words, meaning)
    if not kinds and layout == RELEASED:
        raise ConfigError(f"{take.where} lacks 'attn_type_list': it says which layers are lightning and which softmax")
    # The class's own pattern, for a config.json of a version that leaves out what is as in its class.
    default = tuple(LIGHTNING if number % 2 else SOFTMAX for number in range(num_layers))
    pattern = take.agree(kinds, default)
    if len(pattern) != num_layers:
        raise ConfigError(
            f"{take.where}: {' and '.join(kinds)} speaks of {len(pattern)} layers, num_hidden_layers of {num_layers}"
        )
    return pattern


def _kinds(take: _Taking, name: str, entries: Any, meaning: dict[Any, str]) -> tuple[str, ...]:
    if not isinstance(entries, list) or not all(entry in meaning for entry in entries):
        raise ConfigError(f"{take.where}: {name} must be a list of {' and '.join(map(repr, meaning))}")
    return tuple(meaning[entry] for entry in entries)


def _rope(take: _Taking, head_dim: int) -> dict[str, Any]:
    """Base and rotated channels, both of which may be given in several places."""
    inner = take("rope_parameters", default={})
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name in inner:
        if name not in known:
            raise ConfigError(f"{take.where}: unknown field 'rope_parameters.{name}'{nearest(name, known)}")
    for name in ("rope_type", "type"):
        if inner.get(name, "default") != "default":
            raise ConfigError(f"{take.where}: rope_parameters.{name}={inner[name]!r} is not supported, only 'default'")
    bases = {"rope_theta": take("rope_theta"), "rope_parameters.rope_theta": inner.get("rope_theta")}
    factors = {
        "partial_rotary_factor": take("partial_rotary_factor"),
        "rope_parameters.partial_rotary_factor": inner.get("partial_rotary_factor"),
    }
    channels = {"rotary_dim": take("rotary_dim")} | {
        name: None if factor is None else _channels(take, name, factor, head_dim) for name, factor in factors.items()
    }
    given = lambda values: {name: value for name, value in values.items() if value is not None}  # noqa: E731
    return {
        "rope_base": float(take.agree(given(bases), _DEFAULT_ROPE_BASE)),
        "rotary_dim": take.agree(given(channels), head_dim),
    }


def _channels(take: _Taking, name: str, factor: float, head_dim: int) -> int:
    if not isinstance(factor, (int, float)):
        raise ConfigError(f"{take.where}: {name}={factor!r} is no number")
    channels = factor * head_dim
    if abs(channels - round(channels)) > 1e-6:
        raise ConfigError(f"{take.where}: {name}={factor} of head_dim={head_dim} is no whole number of channels")
    return round(channels)


def _short(value: Any) -> str:
    text = repr(value)
    return f"({len(value)} entries)" if isinstance(value, Sequence) and len(text) > 60 else text
