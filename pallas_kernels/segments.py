"""Documents in a packed row. A document begins wherever the segment id differs from the token before.

Every operation goes by these numbers, so an id that comes back later in a row is another document everywhere.
Shapes: B batch, S tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax


def document_starts(segment_ids_BS: jax.Array) -> jax.Array:
    """True at the first token of each document but the row's first, bool [B, S]."""
    changed_BS = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    return jnp.pad(changed_BS, ((0, 0), (1, 0)))


def document_runs(segment_ids_BS: jax.Array) -> jax.Array:
    """Numbers the documents of each row 0, 1, 2, ...: int32 [B, S], non-decreasing along S."""
    return jnp.cumsum(document_starts(segment_ids_BS), axis=1, dtype=jnp.int32)


def document_positions(segment_ids_BS: jax.Array) -> jax.Array:
    """Each token's distance from the start of its document within the row, int32 [B, S]."""
    index_BS = lax.broadcasted_iota(jnp.int32, segment_ids_BS.shape, 1)
    start_BS = jnp.where(document_starts(segment_ids_BS), index_BS, 0)
    return index_BS - lax.cummax(start_BS, axis=1)
