"""Softmax attention of some tokens of a row to some others of its keys, by splash attention's TPU kernels.

``part.py`` is the same in plain JAX.

Shapes: B batch (1 where all rows are alike), S queries, T keys, H query heads, G key-value heads, K key channels, V
value channels, N slices of keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds

from pallas_kernels.softmax_attention.pairs import FLOOR
from pallas_kernels.softmax_attention.part import NOWHERE, Places
from pallas_kernels.softmax_attention.tpu_kernels import Kernels
from pallas_kernels.softmax_attention.tpu_tables import key_tables, largest_block, query_tables

# The log-sum-exp of padded queries: above any score, so that they take no part in gradients.
_CEILING = -FLOOR


def attention_part_tpu(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    q_places: Places,
    k_places: Places,
    scale: float,
    slice_length: int,
    kernels: Kernels,
) -> tuple[jax.Array, jax.Array]:
    """Attention to these keys alone, as ``attention_part``.

    Args:
      slice_length: so many keys at a time follow each other in the row; T is a multiple.
      kernels: with blocks of powers of two from 128 tokens.

    Returns:
      o [B, S, H, V], in the dtype of the operands: the kernel rounds it. The log-sum-exp of the scores [B, S, H], fp32.
      0 and hugely negative for queries that see none of the keys.
    """
    blocks = kernels.blocks

    def one_row(row: _Row):
        tables = row.query_tables(blocks.block_q, blocks.block_kv)
        return kernels.forward(row.q_HSK, row.k_GTK, row.v_GTV, row.segment_ids, tables)

    rows = _rows(q_BSHK, k_BTGK, v_BTGV, q_places, k_places, scale, slice_length, blocks)
    o_BHSV, lse_BHS = lax.map(one_row, rows)
    S = q_BSHK.shape[1]
    o_BSHV, lse_BSH = o_BHSV.swapaxes(1, 2)[:, :S], lse_BHS.swapaxes(1, 2)[:, :S]
    # A query without any block of keys comes as 0 / 0, and one whose scores are all masked as the mean of the values.
    # The constants are tied to it: rematerialisation would keep them, in the shape of o, for what depends on no weight.
    lse_BSH, floor, nothing = lax.optimization_barrier((lse_BSH, jnp.float32(FLOOR), jnp.zeros((), o_BSHV.dtype)))
    return jnp.where((lse_BSH > floor)[..., None], o_BSHV, nothing), jnp.maximum(lse_BSH, floor)


def attention_part_gradients_tpu(
    q_BSHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    q_places: Places,
    k_places: Places,
    scale: float,
    slice_length: int,
    kernels: Kernels,
    do_BSHV: jax.Array,
    lse_BSH: jax.Array,
    delta_BSH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys contribute to the gradients of attention to all keys, as ``attention_part_gradients``.

    Returns:
      dq [B, S, H, K], dk [B, T, G, K], dv [B, T, G, V], fp32, but of values that the kernels rounded to the dtype of
      the operands.
    """
    blocks = kernels.blocks

    def one_row(of_row):
        row, *of_queries = of_row
        q_tables = None
        if not blocks.use_fused_bwd_kernel:
            q_tables = row.query_tables(blocks.block_q_dq, blocks.block_kv_dq)
        k_tables = row.key_tables(blocks.block_q_dkv, blocks.block_kv_dkv)
        of_keys = row.k_GTK, row.v_GTV
        return kernels.backward((row.q_HSK, *of_queries), of_keys, row.segment_ids, q_tables, k_tables)

    rows = _rows(q_BSHK, k_BTGK, v_BTGV, q_places, k_places, scale, slice_length, blocks)
    padding = -q_BSHK.shape[1] % largest_block(blocks)
    do_BHSV = _heads_first(do_BSHV.astype(v_BTGV.dtype), padding)
    lse_BHS, delta_BHS = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding)), constant_values=value)
        for x, value in ((lse_BSH, _CEILING), (delta_BSH, 0.0))
    )
    found = lax.map(one_row, (rows, do_BHSV, lse_BHS, delta_BHS))
    dq_BSHK, dk_BTGK, dv_BTGV = (
        x.swapaxes(1, 2)[:, : like.shape[1]].astype(jnp.float32)
        for x, like in zip(found, (q_BSHK, k_BTGK, v_BTGV), strict=True)
    )
    return dq_BSHK * scale, dk_BTGK, dv_BTGV


class _Row(NamedTuple):
    """One row, or all of them with B in front; in whole blocks, queries scaled."""

    q_HSK: jax.Array
    k_GTK: jax.Array
    v_GTV: jax.Array
    q_places_S: Places
    k_places_T: Places
    last_key_S: jax.Array

    @property
    def segment_ids(self) -> SegmentIds | None:
        q_runs_S, k_runs_T = self.q_places_S.runs_BS, self.k_places_T.runs_BS
        return None if q_runs_S is None else SegmentIds(q_runs_S, k_runs_T)

    def query_tables(self, q_block: int, k_block: int):
        return self._tables(query_tables, q_block, k_block)

    def key_tables(self, q_block: int, k_block: int):
        return self._tables(key_tables, q_block, k_block)

    def _tables(self, make: Callable, q_block: int, k_block: int):
        places = jax.tree.map(lambda x: x[None], (self.q_places_S, self.k_places_T))
        return make(*places, self.last_key_S, q_block, k_block)


def _rows(q_BSHK, k_BTGK, v_BTGV, q_places: Places, k_places: Places, scale, slice_length, blocks: BlockSizes) -> _Row:
    # Tied to q: rematerialisation would compute what depends on the documents alone once for both passes and keep it.
    q_BSHK, q_places, k_places = lax.optimization_barrier((q_BSHK, q_places, k_places))
    B, S, T = q_BSHK.shape[0], q_BSHK.shape[1], k_BTGK.shape[1]
    q_padding, k_padding = (-length % largest_block(blocks) for length in (S, T))
    # Keys not behind a query, slice by slice.
    slices_BN = k_places.positions_BS[:, ::slice_length]
    counts_BSN = jnp.clip(q_places.positions_BS[..., None] + 1 - slices_BN[:, None], 0, slice_length)
    last_key_BS = jnp.sum(counts_BSN, axis=-1, dtype=jnp.int32) - 1

    def padded(places: Places, padding: int, **how) -> Places:
        """The padding belongs to the last document, so that documents' numbers rise."""
        runs_BS = None if places.runs_BS is None else jnp.pad(places.runs_BS, ((0, 0), (0, padding)), mode="edge")
        return every_row(Places(jnp.pad(places.positions_BS, ((0, 0), (0, padding)), **how), runs_BS))

    def every_row(x):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape[1:])), x)

    return _Row(
        _heads_first((q_BSHK * scale).astype(q_BSHK.dtype), q_padding),
        _heads_first(k_BTGK, k_padding),
        _heads_first(v_BTGV, k_padding),
        padded(q_places, q_padding, mode="edge"),
        padded(k_places, k_padding, constant_values=NOWHERE),
        every_row(jnp.pad(last_key_BS, ((0, 0), (0, q_padding)), mode="edge")),
    )


def _heads_first(x_BSHD: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(x_BSHD, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
