"""Decay of lightning attention: one constant a head and layer, not trained (released modelling code).

A head with slope s forgets by exp(-s) a token. Two rules make the slopes: the released code's, and that of
Transformers' port, which is another model where the number of heads is no power of two. Shapes: H heads.
"""

import math

import numpy as np

RELEASED = "released"
TRANSFORMERS = "transformers"


def head_slopes(num_heads: int, rule: str = RELEASED) -> np.ndarray:
    """ALiBi slopes, as float32 [H].

    2^(-8(h+1)/H) for H a power of two, and by Transformers' rule for every H. The released code otherwise takes the
    slopes of the largest power of two P below H, followed by every second slope of 2P heads.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1")
    _require_rule(rule)
    if rule == TRANSFORMERS:
        return _geometric_slopes(num_heads).astype(np.float32)
    power = 2 ** math.floor(math.log2(num_heads))
    extra = _geometric_slopes(2 * power)[0::2][: num_heads - power]
    return np.concatenate([_geometric_slopes(power), extra]).astype(np.float32)


def layer_factor(layer: int, num_layers: int, rule: str = RELEASED) -> float:
    """Share of the head slopes that a layer uses: from 1 at the bottom to almost 0 at the top.

    The two rules differ by less than 1e-5 of it in all but the last layer.

    Args:
      layer: global index from 0, softmax layers counted.
      num_layers: layers of all kinds.
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer={layer} is outside of 0..{num_layers - 1}")
    _require_rule(rule)
    last = num_layers - 1 + 1e-5 if rule == TRANSFORMERS else max(num_layers - 1, 1)
    return 1.0 - layer / last + 1e-5


def layer_slopes(num_heads: int, layer: int, num_layers: int, rule: str = RELEASED) -> np.ndarray:
    """Slopes of one layer, float32 [H], all positive."""
    return head_slopes(num_heads, rule) * np.float32(layer_factor(layer, num_layers, rule))


def _require_rule(rule: str) -> None:
    if rule not in (RELEASED, TRANSFORMERS):
        raise ValueError(f"slope rule {rule!r} is neither {RELEASED!r} nor {TRANSFORMERS!r}")


def _geometric_slopes(num_heads: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)
