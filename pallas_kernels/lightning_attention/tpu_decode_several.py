"""Several tokens of lightning attention on TPU as one short chunk for each head, on the matrix units.

With the state S before the tokens, token t = 0 .. S - 1 and decay g: o_t = g^(t+1) q_t S + sum over j <= t of
g^(t-j) (q_t k_j) v_j, and the new state is g^S S + sum over t of k_t (g^(S-1-t) v_t). The sums over j are one product
for all heads of a program, masked. Matrix units multiply bf16: q, k and v come in it, decay factors go to the other
side of a product, and that side is cut into parts, so that the new state has fp32's precision and the outputs, which
end as bf16, 16 bits. fp32 operands take the slow products of full precision.

Shapes: S tokens, G heads of a program, K key channels, V value channels, R rows: S x G of them, token by token, and
zeros up to a whole square of lanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention.tpu_block import interleave

_LANES = 128
_F32 = jnp.float32
_HIGH_BITS = 0xFFFF0000
# Items between the stages of the software pipeline.
_LAG = 4


def scratch(S: int, G: int, K: int, V: int) -> list[Any]:
    """Scratch shapes of ``tokens``: rows of queries, keys, values and outputs, in columns of a register's width."""
    rows = -(-S * G // _LANES) * _LANES
    return [pltpu.VMEM((width // _LANES, rows, _LANES), _F32) for width in (K, K, V, V)]


def tokens(S, G, slopes_H, q_SGK, k_SGK, v_SGV, state_GKV, o_SGV, new_state_GKV, *scratch) -> None:
    """The kernel's body; references as in ``tpu_decode.py``."""
    first_head = pl.program_id(1) * G
    # Matrix units multiply 16 bits exactly if all three have no more.
    dtype = jnp.bfloat16 if all(x.dtype == jnp.bfloat16 for x in (q_SGK, k_SGK, v_SGV)) else _F32
    q_RK, k_RK, v_RV, o_RV = (_Rows(ref) for ref in scratch)
    for rows, block in ((q_RK, q_SGK), (k_RK, k_SGK), (v_RV, v_SGV)):
        rows.fill(block[...].astype(_F32).reshape(S * G, -1))
    slopes = [slopes_H[first_head + head] for head in range(G)]
    o_RV[:] = _within(G, slopes, q_RK[:], k_RK[:], v_RV[:], dtype)

    def one_head(head):
        rows, slope, state_KV = pl.ds(head, S, G), slopes[head], state_GKV[head]
        entering_SV = _product(q_RK[rows], _parts(state_KV, 2, dtype), dtype)
        yield
        t_SV = lax.broadcasted_iota(jnp.int32, entering_SV.shape, 0)
        update_KV = _outer(k_RK[rows], _decay(slope, S - 1 - t_SV) * v_RV[rows], dtype)
        yield
        o_RV[rows] += _decay(slope, t_SV + 1) * entering_SV
        over_all_1V = _decay(slope, jnp.full((1, state_KV.shape[1]), S, jnp.int32))
        new_state_GKV[head] = over_all_1V * state_KV + update_KV

    interleave([one_head(head) for head in range(G)], stages=3, lag=_LAG)
    o_SGV[...] = o_RV[: S * G].reshape(o_SGV.shape).astype(o_SGV.dtype)


class _Rows:
    """Rows in VMEM, of which some a fixed distance apart can be taken: that needs arrays one register wide."""

    def __init__(self, ref: Any):
        self._ref = ref

    def __getitem__(self, rows: Any) -> jax.Array:
        return jnp.concatenate([self._ref[column, rows, :] for column in range(self._ref.shape[0])], axis=1)

    def __setitem__(self, rows: Any, values: jax.Array) -> None:
        for column in range(self._ref.shape[0]):
            self._ref[column, rows, :] = values[:, column * _LANES : (column + 1) * _LANES]

    def fill(self, values: jax.Array) -> None:
        """Writes all rows: the values and zeros."""
        missing = self._ref.shape[1] - values.shape[0]
        self[:] = jnp.concatenate([values, jnp.zeros((missing, values.shape[1]), _F32)]) if missing else values


def _within(G: int, slopes: list[jax.Array], q_RK: jax.Array, k_RK: jax.Array, v_RV: jax.Array, dtype) -> jax.Array:
    """What the tokens of each head give each other; row r is token r // G of head r % G."""
    R = q_RK.shape[0]
    i_RR, j_RR = (lax.broadcasted_iota(jnp.int32, (R, R), axis) for axis in (0, 1))
    j_1R = lax.broadcasted_iota(jnp.int32, (1, R), 1)
    slopes_1R = jnp.zeros((1, R), _F32)
    for head, slope in enumerate(slopes):
        slopes_1R = jnp.where(j_1R % G == head, slope, slopes_1R)
    distance_RR = i_RR // G - j_RR // G
    seen_RR = (distance_RR >= 0) & (i_RR % G == j_RR % G)
    weights_RR = jnp.where(seen_RR, _decay(slopes_1R, jnp.maximum(distance_RR, 0)), 0.0)
    scores_RR = weights_RR * _product(q_RK, [k_RK.T], dtype)
    return sum(_product(part_RR, [v_RV], dtype) for part_RR in _parts(scores_RR, 2, dtype))


def _outer(k_SK: jax.Array, v_SV: jax.Array, dtype) -> jax.Array:
    """Sum over tokens of their outer products, one matrix product deep enough for all parts of the values."""
    parts = _parts(v_SV, 3, dtype)
    rows = [jnp.concatenate([k_SK] * len(parts)), jnp.concatenate(parts)]
    missing = -rows[0].shape[0] % _LANES
    keys_RK, values_RV = (jnp.concatenate([x, jnp.zeros((missing, x.shape[1]), _F32)]) for x in rows)
    return _product(keys_RK.T, [values_RV], dtype)


def _product(left: jax.Array, right: list[jax.Array], dtype) -> jax.Array:
    """fp32 product of a matrix and a sum of parts."""
    left, whole = jnp.concatenate([left] * len(right), axis=1), jnp.concatenate(right)
    precision = lax.Precision.HIGHEST if dtype == _F32 else None
    return jnp.dot(left.astype(dtype), whole.astype(dtype), precision=precision, preferred_element_type=_F32)


def _parts(x: jax.Array, count: int, dtype) -> list[jax.Array]:
    """Summands of x with as many bits as ``dtype`` has: two hold 16 of fp32's 24 bits, three all."""
    if dtype == _F32:
        return [x]
    parts = []
    for _ in range(count - 1):
        # A mask, and not a cast there and back: the static profiler of v5e and v5p aborts on those.
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_HIGH_BITS)
        parts.append(lax.bitcast_convert_type(bits, _F32))
        x = x - parts[-1]
    return [*parts, x]


def _decay(slope: jax.Array, distance: jax.Array) -> jax.Array:
    return jnp.exp(-slope * distance.astype(_F32))
