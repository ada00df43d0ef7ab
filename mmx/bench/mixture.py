"""What the loader delivers of the report's long-context mixtures (Table 6), counted token by token.

Documents of every length bucket are made up, each of one letter that says which bucket it is of, so that any stretch of
a row tells where it comes from, and go through everything that real ones do: launch.prepare's code, long-context
questions, and the loader with the mixture that changes where the questions begin. Lengths of documents, rows and
buckets are the report's divided by ``SCALE``; a stage has as many rows as the report's, or as are asked for.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.long_context import TABLE_6 as SHARES
from configs.long_context import get_config
from mmx.config import DataConfig, MixturePoint
from mmx.data.loader import PreparedData, Share
from mmx.data.long_qa import LongQA
from mmx.data.mixture import BUCKETS
from mmx.data.prepare import prepare
from mmx.data.sources import Source

SCALE = 32
_LETTERS = dict(zip(BUCKETS, "sml", strict=True))
# Of the last fifth of a stage, this share is questions.
_QUESTIONS, _QUESTIONS_FROM = 0.1, 0.8


class Stage(NamedTuple):
    """A row of Table 6: tokens of a row and of the stage, percent of each bucket."""

    row: int
    tokens: int
    shares: dict[str, int]


TABLE_6 = {
    stage.name: Stage(
        stage.sequence_length,
        stage.tokens,
        {bucket: share for bucket, share in zip(BUCKETS, SHARES[stage.name], strict=True) if share},
    )
    for stage in get_config().stages
}


def measure(most_rows: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Percent of the tokens that each bucket and the questions have in each stage, beside Table 6's.

    Args:
      most_rows: rows of a stage that are read; the first stage has 2.3 million.
      say: receives a line a stage.
    """
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = make_documents(Path(folder))
        for name, stage in TABLE_6.items():
            rows = min(math.ceil(stage.tokens / stage.row), most_rows)
            result = delivered(data, stage, rows)
            error = max(abs(result["percent"][bucket] - stage.shares.get(bucket, 0)) for bucket in BUCKETS)
            results[name] = {"rows": rows, "wanted": stage.shares, **result, "largest_error": error}
            shares = ", ".join(f"{bucket} {percent:.2f}%" for bucket, percent in result["percent"].items())
            say(f"{name}, {rows:,} rows: {shares} (off by {error:.2f} at most), {result['padding']:.1f}% padding")
    return results


def make_documents(folder: Path) -> Path:
    """Prepared documents of all buckets, three million tokens, and as many of questions made of them."""
    rng = np.random.default_rng(0)
    bounds = (1, 32, 128, 2048)  # Thousands of tokens, as in the report.
    with (folder / "text.jsonl").open("w") as file:
        for bucket, low, high in zip(BUCKETS, bounds, bounds[1:], strict=False):
            made = 0
            while made < 10**6:
                length = int(2**10 / SCALE * math.exp(rng.uniform(math.log(low * 1.01), math.log(high * 0.99))))
                # Without merges a letter is a token; two more are the document's marks.
                text = "\n".join([_LETTERS[bucket] * 15] * (length // 16 + 1))[: length - 2]
                file.write(json.dumps({"text": text}) + "\n")
                made += length
    prepare(
        [Source("text", folder / "text.jsonl")],
        folder / "data",
        tokenizer=None,
        vocab_size=265,
        heldout_fraction=0.1,
        long_qa=[LongQA("text", 3_000_000, (512, 2**20 // SCALE))],
        progress=lambda _: None,
    )
    return folder / "data"


def delivered(data: Path, stage: Stage, rows: int) -> dict[str, Any]:
    """Percent of the tokens by bucket, questions in their length's, and of questions; padding in percent of all."""
    plain = tuple(f"text/{bucket}={share}" for bucket, share in stage.shares.items())
    mixed = tuple(f"text/{bucket}={share * (1 - _QUESTIONS)}" for bucket, share in stage.shares.items())
    mixed += tuple(f"text_qa/{bucket}={share * _QUESTIONS}" for bucket, share in stage.shares.items())
    change = round(rows * _QUESTIONS_FROM)
    config = DataConfig(
        path=str(data),
        sequence_length=stage.row // SCALE,
        batch_size=1,
        mixture_points=(MixturePoint(change - 1, plain), MixturePoint(change, mixed)),
        short_below=2**15 // SCALE,
        long_above=2**17 // SCALE,
    )
    prepared = PreparedData(config)
    letters = {prepared.tokenizer.encode(letter)[0]: bucket for bucket, letter in _LETTERS.items()}
    batches = prepared.training_batches(0, Share())
    counts = dict.fromkeys([*BUCKETS, "questions"], 0)
    for _ in range(rows):
        row = {name: values[0] for name, values in next(batches).items()}
        size, weight = np.bincount(row["segment_ids"]), np.bincount(row["segment_ids"], row["weights"])
        # Of all tokens of a segment but the first, only questions leave some uncounted. None is cut here: the size says
        # the bucket.
        questions = weight < size - 1
        has_letter = {b: np.bincount(row["segment_ids"], row["tokens"] == letter) > 0 for letter, b in letters.items()}
        of_size = (size >= config.short_below).astype(int) + (size > config.long_above)
        questions[0] = False  # Padding.
        counts["questions"] += int(size[questions].sum())
        for number, bucket in enumerate(BUCKETS):
            # A stretch of a document's end mark alone has no letter, and is left out.
            mine = np.where(questions, of_size == number, has_letter[bucket])
            counts[bucket] += int(size[1:][mine[1:]].sum())
    total = sum(counts[bucket] for bucket in BUCKETS)
    percent = {name: 100 * count / total for name, count in counts.items()}
    return {"percent": percent, "padding": 100 * (1 - total / (rows * config.sequence_length))}
