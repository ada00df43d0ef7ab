"""What a rank knows of the slices of a row, inside an island over the context axis: theirs and everyone's.

Documents are numbered over the whole row (``runs``), so that two tokens belong to one document exactly if their
numbers are equal, wherever they lie; an id that comes back later in a row is another document. It takes one gather of
three integers a slice.

Shapes: B batch (1 where all rows are alike), P ranks, N slices a rank, T = P N slices in the order of the ranks, L
tokens of a slice, S = N L local tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mmx.parallel.sequence_layout import SequenceLayout
from pallas_kernels.segments import document_runs


class Slices(NamedTuple):
    """The slices of the rows and, where rows hold several documents, the runs at their edges."""

    length: int  # L
    own_BN: jax.Array  # numbers of this rank's slices
    all_BT: jax.Array  # numbers of all slices
    runs_BS: jax.Array | None  # run of each local token; None where each row is one document
    first_run_BT: jax.Array | None  # run of each slice's first token
    last_run_BT: jax.Array | None  # run of each slice's last token

    def positions(self, ids_BN: jax.Array) -> jax.Array:
        """Places in the whole row of the tokens of the given slices, int32 [B, S]."""
        positions_BNL = ids_BN[..., None] * self.length + np.arange(self.length, dtype=np.int32)
        return positions_BNL.reshape(ids_BN.shape[0], -1)

    def own_edges(self) -> tuple[jax.Array, jax.Array]:
        """Runs of the first and the last token of this rank's slices, [B, N] each."""
        runs_BNL = self.runs_BS.reshape(*self.runs_BS.shape[:1], -1, self.length)
        return runs_BNL[..., 0], runs_BNL[..., -1]


def survey(segment_ids_BS: jax.Array | None, local_length: int, axis: str, layout: SequenceLayout) -> Slices:
    """Looks at the row from this rank.

    Args:
      segment_ids_BS: ids of the local tokens, or None for one document a row.
      local_length: S.
    """
    ranks = lax.axis_size(axis)
    table_PN = layout.slice_ids(ranks)
    N = table_PN.shape[1]
    length = layout.slice_length(local_length * ranks, ranks)
    own_N = jnp.asarray(table_PN)[lax.axis_index(axis)]
    all_T = table_PN.reshape(-1)
    if segment_ids_BS is None:
        return Slices(length, own_N[None], jnp.asarray(all_T)[None], None, None, None)

    B = segment_ids_BS.shape[0]
    ids_BNL = segment_ids_BS.reshape(B, N, length)
    inner_BNL = document_runs(ids_BNL.reshape(B * N, length)).reshape(B, N, length)
    edges_BN3 = jnp.stack([ids_BNL[..., 0], ids_BNL[..., -1], inner_BNL[..., -1]], axis=-1)
    edges_BT3 = jnp.moveaxis(lax.all_gather(edges_BN3, axis), 0, 1).reshape(B, ranks * N, 3)

    # In the order of the text: a slice begins a document unless it goes on with the id before it.
    first_id, last_id, begun = jnp.moveaxis(edges_BT3[:, np.argsort(all_T)], -1, 0)
    begins = jnp.pad(first_id[:, 1:] != last_id[:, :-1], ((0, 0), (1, 0)))
    last_run = jnp.cumsum(begins + begun, axis=1, dtype=jnp.int32)
    first_run_BT, last_run_BT = (last_run - begun).astype(jnp.int32)[:, all_T], last_run[:, all_T]
    own_first_BN = lax.dynamic_slice_in_dim(first_run_BT, lax.axis_index(axis) * N, N, axis=1)
    runs_BS = (inner_BNL + own_first_BN[..., None]).reshape(B, N * length)
    return Slices(length, own_N[None], jnp.asarray(all_T)[None], runs_BS, first_run_BT, last_run_BT)
