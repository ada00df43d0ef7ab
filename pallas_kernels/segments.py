"""Documents in a packed row. A document begins wherever the segment id differs from the token before.

Every operation goes by these numbers, so an id that comes back later in a row is another document everywhere.
Shapes: B batch, S tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax

_SUMMED_AT_ONCE = 1024


def document_starts(segment_ids_BS: jax.Array) -> jax.Array:
    """True at the first token of each document but the row's first, bool [B, S]."""
    changed_BS = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    return jnp.pad(changed_BS, ((0, 0), (1, 0)))


def document_runs(segment_ids_BS: jax.Array) -> jax.Array:
    """Numbers the documents of each row 0, 1, 2, ...: int32 [B, S], non-decreasing along S."""
    starts_BS = document_starts(segment_ids_BS).astype(jnp.int32)
    B, S = starts_BS.shape
    if S <= _SUMMED_AT_ONCE:
        return jnp.cumsum(starts_BS, axis=1)
    # In pieces: a sum along a million tokens at once takes the TPU compiler 20 seconds.
    padded_BS = jnp.pad(starts_BS, ((0, 0), (0, -S % _SUMMED_AT_ONCE)))
    within_BNC = jnp.cumsum(padded_BS.reshape(B, -1, _SUMMED_AT_ONCE), axis=2)
    until_BN = jnp.cumsum(within_BNC[..., -1], axis=1)
    before_BN = jnp.pad(until_BN, ((0, 0), (1, 0)))[:, :-1]
    return (within_BNC + before_BN[..., None]).reshape(B, -1)[:, :S]


def document_positions(segment_ids_BS: jax.Array) -> jax.Array:
    """Each token's distance from the start of its document within the row, int32 [B, S]."""
    index_BS = lax.broadcasted_iota(jnp.int32, segment_ids_BS.shape, 1)
    start_BS = jnp.where(document_starts(segment_ids_BS), index_BS, 0)
    return index_BS - lax.cummax(start_BS, axis=1)
