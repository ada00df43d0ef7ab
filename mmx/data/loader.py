"""Batches for training and evaluation, from prepared data, through grain.

The training data is an endless, seeded mixture with random access; its position is one number, the index of the next
row. So a run may resume with another batch size or another number of processes and reads every row exactly once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from grain.experimental import ElasticIterator

from mmx.config import ConfigError, DataConfig, nearest
from mmx.data.corpus import Corpus, entry_of
from mmx.data.packing import PackedRows, Row
from mmx.data.prepare import REPORT, TOKENIZER
from mmx.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Share:
    """This process's part of every batch."""

    index: int = 0
    count: int = 1


class PreparedData:
    """A folder that launch.prepare wrote. Raises ConfigError if it is not one, or does not fit the configuration."""

    def __init__(self, config: DataConfig):
        self.folder = Path(config.path)
        if not (self.folder / REPORT).exists():
            raise ConfigError(
                f"{self.folder} holds no prepared data: run python -m launch.prepare --output={self.folder}, or "
                "correct data.path"
            )
        self._config = config
        self._report = json.loads((self.folder / REPORT).read_text())
        self.tokenizer_path = self.folder / TOKENIZER
        self.tokenizer = Tokenizer.load(self.tokenizer_path)
        self._weights = self._mixture()

    def training_batches(self, seed: int, share: Share) -> ElasticIterator:
        """An endless iterator of this process's part of each batch; ``get_state`` and ``set_state`` move its position.

        Args:
          seed: decides the order of documents and rows.
          share: of the batch; its count divides the batch size.
        """
        parts = []
        for number, name in enumerate(sorted(self._weights)):
            rows = PackedRows(self._corpus(name, "train"), self._config.sequence_length, seed=seed + number)
            parts.append(grain.MapDataset.source(rows).seed(seed + number).shuffle().repeat())
        weights = [self._weights[name] for name in sorted(self._weights)]
        return ElasticIterator(
            grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0],
            self._config.batch_size,
            grain.sharding.ShardOptions(share.index, share.count, drop_remainder=True),
            read_options=grain.ReadOptions(num_threads=self._config.read_threads, prefetch_buffer_size=64),
        )

    def heldout_batches(self, share: Share) -> Iterator[Row]:
        """This process's part of each batch of held-out rows, the same rows at every call.

        At most ``data.heldout_sequences`` rows, spread evenly over the held-out documents of all sources; the last
        batch is filled up with rows of weight 0.
        """
        sources = [
            PackedRows(self._corpus(name, "heldout"), self._config.sequence_length, seed=None)
            for name in sorted(self._weights)
        ]
        places = [(rows, row) for rows in sources for row in range(len(rows))]
        wanted = min(self._config.heldout_sequences, len(places))
        chosen = [places[i * len(places) // wanted] for i in range(wanted)]
        batch_size = self._config.batch_size
        for start in range(0, wanted, batch_size):
            rows = [source[row] for source, row in chosen[start : start + batch_size]]
            empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
            rows += [empty] * (batch_size - len(rows))
            mine = rows[share.index :: share.count]
            yield {name: np.stack([row[name] for row in mine]) for name in empty}

    def _corpus(self, source: str, split: str) -> Corpus:
        return Corpus(entry_of(self.folder, source, self.folder / REPORT) / split)

    def _mixture(self) -> dict[str, float]:
        """Weight of each source that is read."""
        sources = self._report["sources"]
        if not self._config.mixture:
            return {name: float(report["train"]["tokens"]) for name, report in sources.items()}
        weights = {}
        for entry in self._config.mixture:
            name, _, weight = entry.partition("=")
            if name not in sources:
                raise ConfigError(f"data.mixture: no source {name!r} in {self.folder}{nearest(name, sources)}")
            try:
                weights[name] = float(weight)
            except ValueError:
                raise ConfigError(f"data.mixture: {entry!r} must read source=weight, as in '{name}=0.5'") from None
            if weights[name] <= 0:
                raise ConfigError(f"data.mixture: the weight in {entry!r} must be greater than 0")
        return weights
