"""Rows of documents of mixed length."""

from __future__ import annotations

import numpy as np


def mixed_rows(rows: int, length: int, shortest: int, longest: int, seed: int = 0) -> np.ndarray:
    """Segment ids [B, S] from 1 of full rows; the documents' lengths are log-uniform, and the row cuts the last one."""
    rng = np.random.default_rng(seed)
    return np.stack([_row(rng, length, shortest, longest) for _ in range(rows)])


def _row(rng: np.random.Generator, length: int, shortest: int, longest: int) -> np.ndarray:
    lengths = np.exp(rng.uniform(np.log(shortest), np.log(longest), -(-length // shortest))).astype(int)
    ends = np.minimum(np.cumsum(lengths), length)
    return np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), np.diff(ends, prepend=0))
