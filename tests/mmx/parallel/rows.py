"""Packed rows that are awkward to split, and functions run over ranks as the model runs them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mmx.parallel.sequence_layout import NAMES, SequenceLayout

AXIS = "context"
# Divisible by the most slices, 8 for each of 8 ranks.
LENGTH = 192
# Batch and tokens; other dimensions are whole.
TOKENS = P(None, AXIS)

RANKS_AND_LAYOUTS = [(1, "balanced"), *((ranks, name) for ranks in (2, 4, 8) for name in NAMES)]


def documents(*lengths: int) -> np.ndarray:
    """Ids 1, 2, ... of documents of these lengths, and padding 0 up to the row's end."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, LENGTH - len(ids)))


# Two rows each, so that rows of a batch differ.
SEGMENTS = {
    "one document over all ranks": np.stack([documents(192), documents(192)]),
    "boundaries at the edges": np.stack([documents(*[24] * 8), documents(96, 96)]),
    "boundaries beside the edges": np.stack([documents(23, 2, 23, 49, 95), documents(25, 70, 1, 1, 95)]),
    "shorter than a share": np.stack([documents(*[1, 2, 3, 4, 5] * 12, 12), documents(*[7] * 27, 3)]),
    "documents of one token": np.stack([documents(*[1] * 192), documents(100, *[1] * 80, 12)]),
    "padding behind": np.stack([documents(80), documents(5, 140, 7)]),
    "one beside many": np.stack([documents(192), documents(*[2] * 96)]),
    "ids that come back": np.stack([np.arange(192) // 8 % 2, np.random.default_rng(0).integers(0, 2, 192)]),
}


def rank_mesh(ranks: int) -> jax.sharding.Mesh:
    """The context axis alone."""
    return jax.make_mesh((ranks,), (AXIS,), axis_types=(AxisType.Explicit,), devices=jax.devices()[:ranks])


def split(function: Callable, ranks: int, layout: SequenceLayout) -> Callable:
    """``function(q, k, v, segment_ids, slice_ids)`` of local tokens, as one of whole rows over ``ranks`` devices.

    The function returned takes queries, keys, values, the rows' segment ids, or None, and what ``order`` gives.
    """
    mesh = rank_mesh(ranks)

    def whole(q, k, v, segment_ids, order):
        slice_ids, permutation = order
        arguments = [None if x is None else _take(x, permutation) for x in (q, k, v, segment_ids)]
        arguments.append(slice_ids if layout.depends_on_documents and ranks > 1 else None)
        specs = tuple(None if x is None else TOKENS for x in arguments)
        island = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=TOKENS, check_vma=False)
        tokens, everywhere = jax.NamedSharding(mesh, TOKENS), jax.NamedSharding(mesh, P())
        o = island(*(x if x is None else jax.reshard(x, tokens) for x in arguments))
        return _take(jax.reshard(o, everywhere), jnp.argsort(permutation, axis=1))

    return whole


def _take(x_BSD, index_BS):
    return jnp.take_along_axis(x_BSD, index_BS.reshape(*index_BS.shape, *[1] * (x_BSD.ndim - 2)), axis=1)


def order(ranks: int, layout: SequenceLayout, segment_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slices of all ranks, [B, T], and order of the tokens, [B, S]."""
    B, S = segment_ids.shape
    slice_ids = layout.slice_ids(ranks, segment_ids)
    slice_ids = np.broadcast_to(slice_ids, (B, *slice_ids.shape[-2:])).reshape(B, -1)
    return slice_ids, np.broadcast_to(layout.permutation(S, ranks, segment_ids), (B, S))


def with_gradients(function: Callable, cotangent: np.ndarray) -> Callable:
    """Compiled: output, and gradients with respect to queries, keys and values."""

    def loss(q, k, v, *rest):
        o = function(q, k, v, *rest)
        return jnp.sum(o * cotangent), o

    @jax.jit
    def both(q, k, v, *rest):
        (_, o), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v, *rest)
        return {"o": o, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    return both


def assert_same(got: dict, want: dict, tolerance: float) -> None:
    """Each array to ``tolerance`` of the largest entry."""
    for name, expected in want.items():
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)
