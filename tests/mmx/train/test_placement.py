"""Which rows and tokens land on which device."""

import jax
import numpy as np
import pytest

from mmx.config import MeshConfig
from mmx.data.loader import Share
from mmx.data.packing import ROW_DTYPES
from mmx.parallel import build_mesh
from mmx.parallel.sequence_layout import SequenceLayout
from mmx.train.placement import BatchPlacement

B, S = 4, 32


def rows() -> dict[str, np.ndarray]:
    """Every token tells its row and place."""
    row = {name: np.zeros((B, S), dtype) for name, dtype in ROW_DTYPES.items()}
    row["tokens"] += np.arange(B, dtype=np.int32)[:, None] * 100 + np.arange(S, dtype=np.int32)
    row["segment_ids"] += 1 + (np.arange(S) > 9)
    return row


def test_one_device_takes_everything():
    placement = BatchPlacement(None, SequenceLayout("zigzag"), B, S)
    assert placement.share == Share(0, 1)
    batch = placement.to_devices(rows())
    np.testing.assert_array_equal(batch.tokens_BS, rows()["tokens"])
    assert batch.slice_ids_BT is None


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
def test_devices_hold_the_slices_of_the_layout(layout):
    mesh = build_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    placement = BatchPlacement(mesh, SequenceLayout(layout), B, S)
    assert placement.rows == B
    batch = placement.to_devices(rows())
    slices = SequenceLayout(layout).slice_ids(2, rows()["segment_ids"])
    length = SequenceLayout(layout).slice_length(S, 2)
    for shard in batch.tokens_BS.addressable_shards:
        fsdp, context = np.argwhere(mesh.devices == shard.device)[0][[1, 4]]
        for local, row in enumerate(range(fsdp * 2, fsdp * 2 + 2)):
            mine = slices[row, context] if layout == "balanced" else slices[context]
            want = (mine[:, None] * length + np.arange(length)).reshape(-1) + 100 * row
            np.testing.assert_array_equal(shard.data[local], want)
    if layout == "balanced":
        np.testing.assert_array_equal(jax.device_get(batch.slice_ids_BT), slices.reshape(B, -1))
