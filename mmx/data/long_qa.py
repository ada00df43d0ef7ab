"""A prepared source of long-context questions and answers, made from the documents of another one.

Its documents are samples of mmx.data.recall, of lengths spread evenly on a logarithmic scale, and only their answers
count for the loss. Training samples are made of training documents, held-out ones of held-out documents. Beside each
split's tokens lies ``samples.jsonl``: what each sample is and where its answers and their evidence stand.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmx.config import ConfigError
from mmx.data.corpus import Corpus, CorpusWriter
from mmx.data.recall import RecallTasks, Sample
from mmx.data.tokenizer import Tokenizer

SUFFIX = "_qa"
SAMPLES = "samples.jsonl"
SHORTEST = 256
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True)
class LongQA:
    """What to make.

    Attributes:
      source: whose documents the samples are made of; theirs is ``name``.
      tokens: of all training samples, at least; 0 is a tenth of the source's.
      lengths: shortest and longest sample, in tokens.
      seed: of everything that is drawn.
    """

    source: str
    tokens: int = 0
    lengths: tuple[int, int] = (1024, 2**17)
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the prepared source."""
        return self.source + SUFFIX

    def validate(self) -> None:
        """Raises ConfigError."""
        shortest, longest = self.lengths
        if not SHORTEST <= shortest <= longest:
            raise ConfigError(
                f"--long_qa_lengths={shortest},{longest}: give the shortest and the longest sample in tokens, from "
                f"{SHORTEST} on"
            )
        if self.tokens < 0:
            raise ConfigError(f"--long_qa_tokens={self.tokens} must not be negative")


def write_long_qa(
    wanted: LongQA,
    folder: Path,
    tokenizer: Tokenizer,
    heldout_fraction: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the samples beside the source that they are made of; returns their part of the report."""
    tokens = wanted.tokens or Corpus(folder / wanted.source / "train").tokens // 10
    report: dict[str, Any] = {"synthetic": True, "made_from": wanted.source, "seed": wanted.seed}
    for number, (split, size) in enumerate((("train", tokens), ("heldout", math.ceil(tokens * heldout_fraction)))):
        corpus = Corpus(folder / wanted.source / split)
        rng = np.random.default_rng([wanted.seed, number])
        report[split] = _write_split(
            _samples(wanted, corpus, tokenizer, size, rng), folder / wanted.name / split, tokenizer
        )
    train = report["train"]
    progress(
        f"{wanted.name}: {train['documents']:,} samples, {train['tokens']:,} tokens, of which {train['counted']:,} in "
        f"{train['answers']:,} answers count, {report['heldout']['documents']:,} held out"
    )
    return report


def _samples(
    wanted: LongQA, corpus: Corpus, tokenizer: Tokenizer, size: int, rng: np.random.Generator
) -> Iterator[Sample]:
    """Samples of at least ``size`` tokens, none so long that the same text would have to be in it twice."""
    shortest, longest = wanted.lengths
    longest = min(longest, corpus.tokens)
    if longest < shortest:
        raise ConfigError(
            f"source {wanted.source!r} has a split of {corpus.tokens:,} tokens, less than a sample of {shortest:,}: "
            "give more documents or lower the shortest of --long_qa_lengths"
        )
    tasks = RecallTasks(corpus, tokenizer, rng)
    place, made = rng.random(), 0
    while made < size:
        length = round(shortest * (longest / shortest) ** place)
        for kind in tasks.kinds:
            yield tasks.sample(kind, length)
        made += length * len(tasks.kinds)
        # Evenly spread, however few there are.
        place = (place + _GOLDEN) % 1


def _write_split(samples: Iterator[Sample], folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    writer = CorpusWriter(folder, tokenizer.vocab_size)
    sizes, kinds = tokenizer.token_bytes(), collections.Counter()
    text_bytes = answers = counted = 0
    with (folder / SAMPLES).open("w") as file:
        for sample in samples:
            writer.add(sample.tokens, counted=sample.answers)
            line = {
                "kind": sample.kind,
                "tokens": len(sample.tokens),
                "answers": sample.answers,
                "evidence": sample.evidence,
            }
            file.write(json.dumps(line) + "\n")
            kinds[sample.kind] += 1
            text_bytes += int(sizes[sample.tokens].sum())
            answers += len(sample.answers)
            counted += sum(stop - start for start, stop in sample.answers)
    return {**writer.close(), "bytes": text_bytes, "kinds": dict(kinds), "answers": answers, "counted": counted}
