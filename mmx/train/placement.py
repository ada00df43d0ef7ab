"""Bringing the rows that a process read onto the devices of the run.

Rows are split over the batch axes of the mesh and tokens of a row over ``context``, in the order that the sequence
layout says. Several processes may hold parts of the same rows; they then read the same ones.

Shapes: B rows and S tokens of the whole batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mmx.config import ConfigError
from mmx.data.loader import Share
from mmx.data.packing import ROW_DTYPES, Row
from mmx.parallel import spec
from mmx.parallel.sequence_layout import SequenceLayout
from mmx.train.loss import Batch


class BatchPlacement:
    """Where the rows of every batch go. ``share`` is the part of a batch that this process must read."""

    def __init__(self, mesh: Mesh | None, layout: SequenceLayout, batch_size: int, length: int):
        """``mesh`` None: one device, which takes everything.

        Raises:
          ConfigError: if the mesh gives processes rows that overlap in part.
        """
        self._shape = batch_size, length
        self._layout, self._ranks = layout, 1
        self._sharding, self.share = None, Share()
        if mesh is None:
            return
        self._sharding = NamedSharding(mesh, spec("batch", "attention_sequence"))
        self._ranks = mesh.shape["context"]
        by_process: dict[int, set[tuple[int, int]]] = {}
        for device, (rows, _) in self._sharding.devices_indices_map(self._shape).items():
            by_process.setdefault(device.process_index, set()).add((rows.start or 0, rows.stop or batch_size))
        shares = sorted({tuple(sorted(blocks)) for blocks in by_process.values()})
        if sum(stop - start for blocks in shares for start, stop in blocks) != batch_size:
            raise ConfigError(
                "the mesh gives processes rows that overlap in part: let the batch axes (replica, fsdp, expert and "
                "expert_tensor) divide evenly among the processes, or let processes hold the same rows"
            )
        mine = tuple(sorted(by_process[jax.process_index()]))
        self.share = Share(shares.index(mine), len(shares))
        # First row of each block in the batch -> its first row among those that this process reads.
        sizes = [stop - start for start, stop in mine]
        self._local = {start: sum(sizes[:index]) for index, (start, _) in enumerate(mine)}

    @property
    def rows(self) -> int:
        """Rows of a batch that this process reads."""
        return self._shape[0] // self.share.count

    def empty(self) -> Batch:
        """A batch of zeros."""
        return self.to_devices({name: np.zeros((self.rows, self._shape[1]), t) for name, t in ROW_DTYPES.items()})

    def to_devices(self, row: Row) -> Batch:
        """This process's rows, [rows, S] each, as its part of the global batch."""
        fields, slice_ids = [row[name] for name in ROW_DTYPES], None
        if self._ranks > 1:
            documents = row["segment_ids"] if self._layout.depends_on_documents else None
            order = np.atleast_2d(self._layout.permutation(self._shape[1], self._ranks, documents))
            fields = [np.take_along_axis(x, order, axis=1) for x in fields]
            if documents is not None:
                slice_ids = self._place(self._layout.slice_ids(self._ranks, documents).reshape(self.rows, -1))
        return Batch(*map(self._place, fields), slice_ids)

    def _place(self, local: np.ndarray) -> jax.Array:
        """Rows of this process, [rows, ...], as its part of the global array."""
        if self._sharding is None:
            return jnp.asarray(local)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            rows, columns = index
            start = rows.start or 0
            count = (self._shape[0] if rows.stop is None else rows.stop) - start
            first = self._local[start]
            return local[first : first + count, columns]

        return jax.make_array_from_callback((self._shape[0], local.shape[1]), self._sharding, shard)
