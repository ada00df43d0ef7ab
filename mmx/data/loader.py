"""Batches for training and evaluation, from prepared data, through grain.

The training data is an endless, seeded mixture with random access; its position is one number, the index of the next
row. So a run may resume with another batch size or another number of processes and reads every row exactly once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from grain.experimental import ElasticIterator

from mmx.config import ConfigError, DataConfig
from mmx.data.corpus import Corpus, entry_of
from mmx.data.interleave import Interleaving
from mmx.data.mixture import LONG, MEDIUM, Mixture, Part, in_bucket
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
        self._corpus = functools.cache(
            lambda source, split: Corpus(entry_of(self.folder, source, self.folder / REPORT) / split)
        )
        sources = {name: self._is_synthetic(name) for name in self._report["sources"]}
        self._mixture = Mixture(config, sources, self._tokens)

    def training_batches(self, seed: int, share: Share) -> ElasticIterator:
        """An endless iterator of this process's part of each batch; ``get_state`` and ``set_state`` move its position.

        Args:
          seed: decides the order of documents and rows.
          share: of the batch; its count divides the batch size.
        """
        parts = [self._rows(part, seed + number) for number, part in enumerate(self._mixture.parts)]
        row_shares = functools.partial(self._mixture.row_shares, fill=[rows.fill for rows in parts])
        return ElasticIterator(
            grain.MapDataset.select_from_datasets(
                [
                    grain.MapDataset.source(rows).seed(seed + number).shuffle().repeat()
                    for number, rows in enumerate(parts)
                ],
                Interleaving(row_shares, self._mixture.changes),
            ),
            self._config.batch_size,
            grain.sharding.ShardOptions(share.index, share.count, drop_remainder=True),
            read_options=grain.ReadOptions(num_threads=self._config.read_threads, prefetch_buffer_size=64),
        )

    def passes(self, rows: int) -> dict[Part, float]:
        """How often the first ``rows`` training rows go over each part, counting every row as full."""
        places = np.linspace(0, rows, 1001)[:-1]  # Shares move linearly: this is exact enough.
        tokens_P = self._mixture.shares(places).mean(axis=0) * rows * self._config.sequence_length
        return {part: float(n) / self._tokens(part) for part, n in zip(self._mixture.parts, tokens_P, strict=True)}

    def heldout_batches(self, share: Share) -> Iterator[Row]:
        """This process's part of each batch of held-out rows, the same rows at every call.

        At most ``data.heldout_sequences`` rows, spread evenly over the held-out documents of all sources in the
        mixture, whatever their buckets and weights; the last batch is filled up with rows of weight 0.
        """
        names = sorted({part.source for part in self._mixture.parts})
        # Synthetic samples would say how well those are answered, in a number that is read as the loss on text.
        names = [name for name in names if not self._is_synthetic(name)] or names
        sources = [PackedRows(self._corpus(name, "heldout"), self._config.sequence_length, seed=None) for name in names]
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

    def _rows(self, part: Part, seed: int) -> PackedRows:
        corpus = self._corpus(part.source, "train")
        documents = np.flatnonzero(in_bucket(np.asarray(corpus.lengths), part.bucket, self._config))
        # A synthetic sample asks about what lies far before: it is of no use in parts.
        whole = part.bucket in (MEDIUM, LONG) or self._is_synthetic(part.source)
        return PackedRows(corpus, self._config.sequence_length, seed, documents=documents, whole=whole)

    def _tokens(self, part: Part) -> int:
        lengths = np.asarray(self._corpus(part.source, "train").lengths)
        return int(lengths[in_bucket(lengths, part.bucket, self._config)].sum())

    def _is_synthetic(self, source: str) -> bool:
        return self._report["sources"][source].get("synthetic", False)
