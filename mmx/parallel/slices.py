"""What a rank knows of the slices of a row, inside an island over the context axis: theirs and everyone's.

Documents are numbered over the whole row (``runs``), so that two tokens belong to one document exactly if their
numbers are equal, wherever they lie; an id that comes back later in a row is another document. It takes one gather of
four integers a slice.

Shapes: B batch (1 where all rows are alike), P ranks, N slices a rank, T = P N slices in the order of the ranks, L
tokens of a slice, S = N L local tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
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

    def own_edges(self) -> tuple[jax.Array, jax.Array]:
        """Runs of the first and the last token of this rank's slices, [B, N] each."""
        runs_BNL = self.runs_BS.reshape(*self.runs_BS.shape[:1], -1, self.length)
        return runs_BNL[..., 0], runs_BNL[..., -1]


def survey(
    segment_ids_BS: jax.Array | None,
    slice_ids_BN: jax.Array | None,
    local_length: int,
    axis: str,
    layout: SequenceLayout,
) -> Slices:
    """Looks at the row from this rank.

    Args:
      segment_ids_BS: ids of the local tokens, or None for one document a row.
      slice_ids_BN: numbers of this rank's slices where the layout depends on the documents, else None.
      local_length: S.

    Raises:
      ValueError: if the numbers of the slices are missing, or given to a layout that fixes them.
    """
    ranks, rank = lax.axis_size(axis), lax.axis_index(axis)
    N, length = layout.slices_per_rank(ranks), layout.slice_length(local_length * ranks, ranks)
    if layout.depends_on_documents != (slice_ids_BN is not None):
        raise ValueError(f"the {layout.name} layout {'needs' if slice_ids_BN is None else 'takes no'} slice_ids_BN")
    gather = lambda x: jnp.moveaxis(lax.all_gather(x, axis), 0, 1).reshape(x.shape[0], ranks * N, *x.shape[2:])  # noqa: E731
    if slice_ids_BN is None:
        table_PN = jnp.asarray(layout.slice_ids(ranks))
        slice_ids_BN, all_BT = table_PN[rank][None], table_PN.reshape(1, -1)
    elif segment_ids_BS is None:
        all_BT = gather(slice_ids_BN)
    if segment_ids_BS is None:
        return Slices(length, slice_ids_BN, all_BT, None, None, None)

    B = segment_ids_BS.shape[0]
    ids_BNL = segment_ids_BS.reshape(B, N, length)
    inner_BNL = document_runs(ids_BNL.reshape(B * N, length)).reshape(B, N, length)
    edges = jnp.broadcast_to(slice_ids_BN, (B, N)), ids_BNL[..., 0], ids_BNL[..., -1], inner_BNL[..., -1]
    edges_BT4 = gather(jnp.stack(edges, axis=-1))
    all_BT = edges_BT4[..., 0]

    # In the order of the text: a slice begins a document unless it goes on with the id before it.
    in_order_BT4 = jnp.take_along_axis(edges_BT4, jnp.argsort(all_BT, axis=1)[..., None], axis=1)
    _, first_id, last_id, begun = jnp.moveaxis(in_order_BT4, -1, 0)
    begins = jnp.pad(first_id[:, 1:] != last_id[:, :-1], ((0, 0), (1, 0)))
    last_run = jnp.cumsum(begins + begun, axis=1, dtype=jnp.int32)
    first_run = last_run - begun.astype(jnp.int32)
    first_run_BT, last_run_BT = (jnp.take_along_axis(x, all_BT, axis=1) for x in (first_run, last_run))
    own_first_BN = lax.dynamic_slice_in_dim(first_run_BT, rank * N, N, axis=1)
    runs_BS = (inner_BNL + own_first_BN[..., None]).reshape(B, N * length)
    return Slices(length, slice_ids_BN, all_BT, runs_BS, first_run_BT, last_run_BT)
