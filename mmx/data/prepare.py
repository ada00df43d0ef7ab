"""Raw sources to prepared data: split by document, train a tokenizer, tokenize once, write shards and a report.

A prepared folder holds ``tokenizer.json``, ``dataset.json`` (the report) and one folder a source with the splits
``train`` and ``heldout`` (mmx.data.corpus).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmx.config import ConfigError, DataConfig, nearest
from mmx.data.corpus import Corpus, CorpusWriter
from mmx.data.long_qa import LongQA, write_long_qa
from mmx.data.mixture import BUCKETS, in_bucket
from mmx.data.sources import Document, Source
from mmx.data.tokenizer import Tokenizer

SPLITS = ("train", "heldout")
REPORT = "dataset.json"
TOKENIZER = "tokenizer.json"
# Text that a tokenizer is trained on, at most; merges hardly change beyond it.
_TRAINING_BYTES = 10**9
# Documents that are tokenized at once; tokens take more memory than their text.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**23


def prepare(
    sources: Sequence[Source],
    output: Path,
    *,
    tokenizer: Path | None,
    vocab_size: int,
    heldout_fraction: float,
    long_qa: Sequence[LongQA] = (),
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Prepares data for training; returns the report that it also writes.

    Everything is written beside ``output`` and moved there at the end: a run that is interrupted leaves nothing that
    looks finished.

    Args:
      sources: with distinct names.
      output: folder that does not exist yet.
      tokenizer: an existing ``tokenizer.json``; None trains one on the sources' training documents.
      vocab_size: of a tokenizer trained here.
      heldout_fraction: share of the documents that is held out, chosen by a hash of their names.
      long_qa: synthetic sources to make of these.
      progress: receives a line now and then.

    Raises:
      ConfigError: if the output exists, a source cannot be read, a split would be empty, or ``long_qa`` does not fit.
    """
    if output.exists():
        raise ConfigError(f"{output} exists: remove it or choose another output")
    if not 0 < heldout_fraction < 1:
        raise ConfigError(f"heldout_fraction={heldout_fraction} must be between 0 and 1")
    names = [source.name for source in sources]
    for wanted in long_qa:
        wanted.validate()
        if wanted.source not in names:
            raise ConfigError(f"--long_qa={wanted.source}: no source of that name{nearest(wanted.source, names)}")
    names += [wanted.name for wanted in long_qa]
    if len(set(names)) != len(names):
        raise ConfigError(f"two sources share a name among {', '.join(names)}: rename one")
    started = time.monotonic()
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    encoder = Tokenizer.load(tokenizer) if tokenizer else _train(sources, vocab_size, heldout_fraction, progress)
    encoder.save(partial / TOKENIZER)
    written = {source.name: _write(source, partial, encoder, heldout_fraction, progress) for source in sources}
    for wanted in long_qa:
        written[wanted.name] = write_long_qa(wanted, partial, encoder, heldout_fraction, progress)
    for name, part in written.items():
        for split in SPLITS:
            part[split]["buckets"] = _buckets(Corpus(partial / name / split).lengths)
    report = {"vocab_size": encoder.vocab_size, "heldout_fraction": heldout_fraction, "sources": written}
    report["seconds"] = round(time.monotonic() - started, 1)
    (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(output)
    return report


def is_held_out(name: str, fraction: float) -> bool:
    """Whether documents of this name are held out; the same on every machine and for every order of files."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _buckets(lengths: np.ndarray) -> dict[str, dict[str, int]]:
    """Documents and tokens of each length bucket, by the report's bounds; training may set others."""
    bounds = DataConfig()
    found = {bucket: lengths[in_bucket(lengths, bucket, bounds)] for bucket in BUCKETS}
    return {bucket: {"documents": len(mine), "tokens": int(mine.sum())} for bucket, mine in found.items()}


def _train(sources: Sequence[Source], vocab_size: int, heldout_fraction: float, progress) -> Tokenizer:
    progress(f"training a tokenizer of {vocab_size:,} tokens")
    documents = itertools.chain.from_iterable(sources)
    texts = (document.text for document in documents if not is_held_out(document.held_out_with, heldout_fraction))
    return Tokenizer.train(_at_most(texts, _TRAINING_BYTES), vocab_size)


def _at_most(texts: Iterable[str], size: int) -> Iterator[str]:
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(source: Source, folder: Path, tokenizer: Tokenizer, heldout_fraction: float, progress) -> dict[str, Any]:
    """Writes one source's splits; returns its part of the report."""
    writers = {split: CorpusWriter(folder / source.name / split, tokenizer.vocab_size) for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    done, announced = 0, time.monotonic()
    for batch in _batches(source):
        for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            split = "heldout" if is_held_out(document.held_out_with, heldout_fraction) else "train"
            writers[split].add([tokenizer.begin_of_document, *ids, tokenizer.end_of_document])
            sizes[split] += len(document.text.encode())
        done += len(batch)
        if time.monotonic() - announced > 5:
            announced = time.monotonic()
            progress(f"{source.name}: {done:,} documents tokenized")
    report: dict[str, Any] = {"path": str(source.path), "unreadable_files": source.unreadable}
    for split, writer in writers.items():
        totals = writer.close()
        if not totals["documents"]:
            raise ConfigError(
                f"source {source.name!r} has {done} documents and none for the {split} split: give more documents or "
                "change --heldout_fraction"
            )
        report[split] = {**totals, "bytes": sizes[split]}
    train = report["train"]
    progress(
        f"{source.name}: {train['documents']:,} documents, {train['tokens']:,} tokens to train on "
        f"({train['bytes'] / train['tokens']:.2f} bytes a token), {report['heldout']['documents']:,} held out"
    )
    return report
