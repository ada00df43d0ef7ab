"""A prepared folder of a few made-up documents: enough to train on, made in a second."""

import json
from pathlib import Path

import numpy as np

from mmx.data.prepare import prepare
from mmx.data.sources import Source

VOCAB_SIZE = 280
WORDS = ("def", "return", "state", "decay", "query", "key", "value", "expert", "router", "norm")


def prepare_words(folder: Path, documents: int = 120) -> Path:
    """Sentences in which the next word mostly follows from the last one, so that there is something to learn."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "words.jsonl").open("w") as file:
        for _ in range(documents):
            steps = rng.choice([1, 1, 1, 3], int(rng.integers(5, 60)))
            file.write(json.dumps({"text": " ".join(WORDS[i % len(WORDS)] for i in np.cumsum(steps))}) + "\n")
    source = Source("words", folder / "words.jsonl")
    prepare(
        [source], folder / "data", tokenizer=None, vocab_size=VOCAB_SIZE, heldout_fraction=0.1, progress=lambda _: None
    )
    return folder / "data"
