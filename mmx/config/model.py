"""Dimensions and switches of the text model.

Defaults are a small hybrid, not the released model: ``configs/minimax_text_01.py`` has those shapes.
Sources: MiniMax-01 report (arXiv 2501.08313) sections 2 and 5, and the released config.json.
"""

import dataclasses

from mmx.config.errors import ConfigError

LIGHTNING = "lightning"
SOFTMAX = "softmax"
HYBRID_PERIOD = (LIGHTNING,) * 7 + (SOFTMAX,)

DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "selective", "offload", "full")
AUX_LOSS_FORMS = ("paper", "released")
# Name -> slices of a row that each device of mesh.context holds.
SEQUENCE_LAYOUTS = {"contiguous": 1, "zigzag": 2, "balanced": 8}
EXPERT_EXCHANGES = ("auto", "padded", "ragged", "gather")
SLOPE_RULES = ("released", "transformers")
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "experts_per_token",
    "expert_hidden_size",
    "exchange_groups",
)


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
    """Everything that decides the shapes and the arithmetic of the text model.

    Flags assign to its fields, so it is not frozen; whoever uses it as a key keeps a copy of its own.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 8
    # One kind a layer, "lightning" or "softmax"; its length is num_layers.
    layer_pattern: tuple[str, ...] = HYBRID_PERIOD

    num_heads: int = 4
    # Key and value heads of the softmax layers; lightning layers have num_heads of each.
    num_kv_heads: int = 2
    head_dim: int = 64
    # Channels of each softmax head that RoPE rotates, counted from the first; the rest pass through.
    rotary_dim: int = 32
    rope_base: float = 10_000.0
    # Whose decay slopes the lightning layers have: the released code's, or those of Transformers' port, which are
    # others where num_heads is no power of two (pallas_kernels/lightning_attention/decay.py). Set by conversion.
    slope_rule: str = "released"

    num_experts: int = 4
    experts_per_token: int = 2
    expert_hidden_size: int = 512
    # Assignments an expert takes, as a multiple of the even share; 0 is dropless.
    capacity_factor: float = 0.0
    # True: one capacity over the whole batch, filled in the same order on every mesh (report section 2.2).
    # False: a capacity for the tokens of each device, or of each group that it cuts them into.
    global_router: bool = False
    # "paper": coefficient * (1/E) sum_i f_i m_i, summed over layers (section 2.2).
    # "released": coefficient * E sum_i f_i P_i with f and P averaged over layers first, as the released
    # code has it, for fine-tuning a converted checkpoint; larger by about E squared.
    aux_loss_form: str = "paper"
    aux_loss_coefficient: float = 0.01

    # True: the residual is the normalised input (DeepNorm, the released model). False: pre-norm.
    postnorm: bool = True
    # Residual is alpha * input + beta * branch, by kind of branch. None means DeepNorm's (2 * num_layers)^(1/4)
    # under postnorm, and 1 under pre-norm.
    lightning_alpha: float | None = None
    lightning_beta: float = 1.0
    softmax_alpha: float | None = None
    softmax_beta: float = 1.0
    experts_alpha: float | None = None
    experts_beta: float = 1.0
    # The output norm inside lightning attention always has 1e-6, whatever this says (released code).
    norm_eps: float = 1e-5

    tie_embeddings: bool = False
    # Activations; norms' statistics, decays, states, router, softmax and loss are fp32 whatever this says.
    dtype: str = "float32"
    param_dtype: str = "float32"
    # Logits accumulated and returned in fp32; False rounds them to dtype first.
    logits_fp32: bool = True
    # What the backward pass recomputes: "none"; "selective", all but attention's results and the routing; "offload",
    # the same, with attention's results waiting in the host's memory; "full", everything but each layer's input.
    remat: str = "none"

    # How the work is spread over a mesh; without token drop the numbers do not depend on it.
    # What a device holds of a row that is split over mesh.context: "zigzag" is a piece from its start and one from its
    # end, the same causal work for all where a row is one document; "balanced" is eight pieces, dealt by the work of
    # the row's documents, for packed rows; "contiguous" is one piece.
    sequence_layout: str = "zigzag"
    # How tokens travel to experts on other devices (mmx/parallel/exchange.py); "auto" decides by platform.
    expert_exchange: str = "auto"
    # Groups that a device's tokens are cut into, so that one's exchange overlaps the experts' work on another.
    exchange_groups: int = 1

    def alpha(self, branch: str) -> float:
        """Residual multiplier of ``branch`` ("lightning", "softmax" or "experts")."""
        value = getattr(self, f"{branch}_alpha")
        if value is not None:
            return value
        return (2 * self.num_layers) ** 0.25 if self.postnorm else 1.0

    def beta(self, branch: str) -> float:
        """Branch multiplier of ``branch`` ("lightning", "softmax" or "experts")."""
        return getattr(self, f"{branch}_beta")

    def validate(self) -> None:
        """Raises ConfigError with a sentence that says what to change."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}: set it to at least 1")
        if len(self.layer_pattern) != self.num_layers:
            raise ConfigError(
                f"model.layer_pattern has {len(self.layer_pattern)} entries and model.num_layers is "
                f"{self.num_layers}: list one kind for each layer"
            )
        for kind in self.layer_pattern:
            if kind not in (LIGHTNING, SOFTMAX):
                raise ConfigError(
                    f"model.layer_pattern contains {kind!r}: use {LIGHTNING!r} or {SOFTMAX!r} for each layer"
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}: "
                "every key-value head serves the same number of query heads"
            )
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ConfigError(
                f"model.rotary_dim={self.rotary_dim} must be even and between 0 and model.head_dim={self.head_dim}"
            )
        if self.rope_base <= 1:
            raise ConfigError(f"model.rope_base={self.rope_base} must be greater than 1")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"model.experts_per_token={self.experts_per_token} exceeds model.num_experts={self.num_experts}: "
                "lower the first or raise the second"
            )
        if self.capacity_factor < 0:
            raise ConfigError(
                f"model.capacity_factor={self.capacity_factor} is negative: use 0 for dropless or, say, 1.25"
            )
        for name in ("lightning_alpha", "softmax_alpha", "experts_alpha", "norm_eps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"model.{name}={value} must be greater than 0")
        _require_choice("model.slope_rule", self.slope_rule, SLOPE_RULES)
        _require_choice("model.aux_loss_form", self.aux_loss_form, AUX_LOSS_FORMS)
        _require_choice("model.dtype", self.dtype, DTYPES)
        _require_choice("model.param_dtype", self.param_dtype, DTYPES)
        _require_choice("model.remat", self.remat, REMAT_POLICIES)
        _require_choice("model.sequence_layout", self.sequence_layout, tuple(SEQUENCE_LAYOUTS))
        _require_choice("model.expert_exchange", self.expert_exchange, EXPERT_EXCHANGES)
        if self.global_router and not self.capacity_factor:
            raise ConfigError(
                "model.global_router shares the experts' capacity and model.capacity_factor=0 sets none: use, say, "
                "1.25, or leave the global router off"
            )


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
