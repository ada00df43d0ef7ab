"""Packed rows that are awkward to split, and functions run over ranks as the model runs them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mmx.parallel.sequence_layout import SequenceLayout

AXIS = "context"
# Divisible by 16 slices of 6 tokens.
LENGTH = 96
# Batch and tokens; other dimensions are whole.
TOKENS = P(None, AXIS)

RANKS_AND_LAYOUTS = [(1, "zigzag"), *((ranks, name) for ranks in (2, 4, 8) for name in ("contiguous", "zigzag"))]


def documents(*lengths: int) -> np.ndarray:
    """Ids 1, 2, ... of documents of these lengths, and padding 0 up to the row's end."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, LENGTH - len(ids)))


# Two rows each, so that rows of a batch differ.
SEGMENTS = {
    "one document over all ranks": np.stack([documents(96), documents(96)]),
    "boundaries at the edges": np.stack([documents(*[12] * 8), documents(48, 48)]),
    "boundaries beside the edges": np.stack([documents(11, 2, 11, 25, 47), documents(13, 34, 1, 1, 47)]),
    "shorter than a share": np.stack([documents(*[1, 2, 3, 4, 5] * 6, 6), documents(*[7] * 13, 5)]),
    "documents of one token": np.stack([documents(*[1] * 96), documents(50, *[1] * 40, 6)]),
    "padding behind": np.stack([documents(40), documents(5, 70, 3)]),
    "one beside many": np.stack([documents(96), documents(*[2] * 48)]),
    "ids that come back": np.stack([np.arange(96) // 8 % 2, np.random.default_rng(0).integers(0, 2, 96)]),
}


def rank_mesh(ranks: int) -> jax.sharding.Mesh:
    """The context axis alone."""
    return jax.make_mesh((ranks,), (AXIS,), axis_types=(AxisType.Explicit,), devices=jax.devices()[:ranks])


def split(function: Callable, ranks: int, layout: SequenceLayout) -> Callable:
    """``function(q, k, v, segment_ids)`` of local tokens, as a function of whole rows over ``ranks`` devices."""
    mesh = rank_mesh(ranks)

    def whole(q, k, v, segment_ids=None):
        order, back = layout.permutation(q.shape[1], ranks), layout.inverse(q.shape[1], ranks)
        arguments = [x[:, order] for x in (q, k, v, segment_ids) if x is not None]
        island = jax.shard_map(
            lambda q, k, v, segment_ids=None: function(q, k, v, segment_ids),
            mesh=mesh,
            in_specs=(TOKENS,) * len(arguments),
            out_specs=TOKENS,
            check_vma=False,
        )
        o = island(*(jax.reshard(x, jax.NamedSharding(mesh, TOKENS)) for x in arguments))
        return jax.reshard(o, jax.NamedSharding(mesh, P()))[:, back]

    return whole


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
