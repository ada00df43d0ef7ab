"""What a mixture's entries mean: parts of the prepared data and their shares of the tokens, row by row.

A part is a source's documents, or those of one length bucket. Entries read ``source=weight``, ``source/bucket=weight``
or ``*/bucket=weight``; ``*`` stands for every source of documents, each in proportion to its tokens there. Synthetic
sources take part only where they are named.

Shapes: P parts, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmx.config import ConfigError, DataConfig, nearest

SHORT, MEDIUM, LONG = BUCKETS = ("short", "medium", "long")
ALL_SOURCES = "*"


class Part(NamedTuple):
    """Documents that rows are made of; an empty bucket takes them all."""

    source: str
    bucket: str = ""

    def __str__(self) -> str:
        return f"{self.source}/{self.bucket}" if self.bucket else self.source


def in_bucket(lengths: np.ndarray, bucket: str, config: DataConfig) -> np.ndarray:
    """Which documents are in a bucket, bool; lengths in tokens."""
    if not bucket:
        return np.ones(len(lengths), bool)
    long = lengths > config.long_above
    short = lengths < config.short_below
    return {SHORT: short, MEDIUM: ~short & ~long, LONG: long}[bucket]


class Mixture:
    """Parts, in a fixed order, and their shares of the tokens at each row.

    Attributes:
      parts: every part that some row takes.
      changes: ascending rows between which the shares move linearly.
    """

    def __init__(self, config: DataConfig, sources: Mapping[str, bool], tokens: Callable[[Part], int]):
        """Reads ``mixture`` or ``mixture_points``.

        Args:
          config: with the entries.
          sources: name of each prepared source, and whether it is synthetic.
          tokens: number of tokens that a part has to train on.

        Raises:
          ConfigError: if an entry cannot be read, is there twice, or names what there is not.
        """
        points = [(point.row, point.weights) for point in config.mixture_points] or [(0, config.mixture)]
        weights = [_Entries(sources, tokens, config).read(entries) for _, entries in points]
        self.parts = sorted({part for point in weights for part in point})
        self.changes = [row for row, _ in points]
        table = np.asarray([[point.get(part, 0.0) for part in self.parts] for point in weights])
        self._shares = table / table.sum(axis=1, keepdims=True)

    def shares(self, rows: np.ndarray) -> np.ndarray:
        """Shares of the tokens, [N, P], fp64, at rows [N]."""
        columns = [np.interp(rows, self.changes, column) for column in self._shares.T]
        return np.stack(columns, axis=1)

    def row_shares(self, rows: np.ndarray, fill: Sequence[float]) -> np.ndarray:
        """Shares of the rows that make ``shares`` of the tokens if parts fill their rows to ``fill`` [P], [N, P]."""
        shares = self.shares(rows) / np.asarray(fill)
        return shares / shares.sum(axis=1, keepdims=True)


class _Entries:
    """Reads entries against what is prepared."""

    def __init__(self, sources: Mapping[str, bool], tokens: Callable[[Part], int], config: DataConfig):
        self._sources, self._tokens, self._config = sources, tokens, config
        self._documents = [name for name, synthetic in sources.items() if not synthetic]

    def read(self, entries: Sequence[str]) -> dict[Part, float]:
        """Weight of each part that the entries name; without entries, of each source of documents by its tokens."""
        if not entries:
            return self._spread(ALL_SOURCES, "", 1.0)
        weights: dict[Part, float] = {}
        seen = set()
        for entry in entries:
            name, _, number = entry.partition("=")
            source, has_bucket, bucket = name.partition("/")
            if source != ALL_SOURCES and source not in self._sources:
                hint = nearest(source, self._sources)
                raise ConfigError(f"data.mixture: no source {source!r} in {self._config.path}{hint}")
            if has_bucket and bucket not in BUCKETS:
                raise ConfigError(f"data.mixture: {entry!r} names no bucket: use {', '.join(BUCKETS)}")
            if name in seen:
                raise ConfigError(f"data.mixture: {name!r} is there twice: give it one weight")
            seen.add(name)
            try:
                weight = float(number)
            except ValueError:
                raise ConfigError(f"data.mixture: {entry!r} must read source=weight, as in '{name}=0.5'") from None
            if not 0 < weight < float("inf"):
                raise ConfigError(f"data.mixture: the weight in {entry!r} must be greater than 0")
            for part, share in self._spread(source, bucket, weight).items():
                weights[part] = weights.get(part, 0.0) + share
        return weights

    def _spread(self, source: str, bucket: str, weight: float) -> dict[Part, float]:
        """An entry's weight over the parts that it stands for, by their tokens."""
        names = self._documents if source == ALL_SOURCES else [source]
        tokens = {Part(name, bucket): self._tokens(Part(name, bucket)) for name in names}
        total = sum(tokens.values())
        if not total:
            where = self._config.path if source == ALL_SOURCES else f"source {source!r}"
            bounds = {
                SHORT: f"under {self._config.short_below:,} tokens (data.short_below)",
                MEDIUM: f"of {self._config.short_below:,} to {self._config.long_above:,} tokens (data.short_below, "
                "data.long_above)",
                LONG: f"over {self._config.long_above:,} tokens (data.long_above)",
                "": "to train on",
            }[bucket]
            raise ConfigError(f"data.mixture: {where} has no document {bounds}: take the entry out or move the bound")
        return {part: weight * count / total for part, count in tokens.items() if count}
