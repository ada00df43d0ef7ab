"""Proof that a conversion lost nothing: the checksum of every tensor, both sides, a tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from mmx.config import ConfigError, ModelConfig
from mmx.convert.ahead import read_ahead
from mmx.convert.names import Tensor, tensors
from mmx.convert.safetensors import TensorReader
from mmx.convert.transfer import ReadParameter, tensor_values

_AHEAD_BYTES = 256 << 20


def compare(
    config: ModelConfig, reader: TensorReader, spelling: str, read: ReadParameter, progress: Callable[[int], None]
) -> int:
    """Compares the SHA-256 of every tensor of a PyTorch checkpoint with that of the same tensor made of parameters.

    Where the two sides have different dtypes, the wider is cast to the narrower first.

    Args:
      reader: the PyTorch side; its experts are spelt as ``spelling`` says.
      read: reads a box of a parameter, our side.
      progress: called with the bytes of each tensor that was compared.

    Returns:
      The number of tensors.

    Raises:
      ConfigError: if any differs, by their names.
    """
    wanted = list(tensors(config, spelling))

    def check(tensor: Tensor) -> tuple[str, int, bool]:
        theirs = reader.read(tensor.name, tensor.shape, tuple(slice(0, n) for n in tensor.shape))
        ours = tensor_values(tensor, read)
        narrower = min(theirs.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
        nbytes = theirs.nbytes
        same = _checksum(theirs.astype(narrower, copy=False)) == _checksum(ours.astype(narrower, copy=False))
        return tensor.name, nbytes, same

    sizes = (tensor.size * reader.info(tensor.name).dtype.itemsize for tensor in wanted)
    tasks = ((size, lambda tensor=tensor: check(tensor)) for size, tensor in zip(sizes, wanted, strict=True))
    different = []
    for name, nbytes, same in read_ahead(tasks, _AHEAD_BYTES):
        progress(nbytes)
        if not same:
            different.append(name)
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ConfigError(f"the conversion is not exact: {', '.join(different[:3])}{more} differ; convert again")
    return len(wanted)


def _checksum(values: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8)).digest()
