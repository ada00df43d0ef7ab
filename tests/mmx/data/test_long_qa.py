"""Synthetic questions: right answers, at known places, and nothing else counts for the loss."""

import json
import re

import numpy as np
import pytest

from mmx.config import ConfigError, DataConfig
from mmx.data import recall
from mmx.data.corpus import Corpus
from mmx.data.loader import PreparedData, Share
from mmx.data.long_qa import SAMPLES, LongQA
from mmx.data.prepare import prepare
from mmx.data.sources import Source
from mmx.data.tokenizer import Tokenizer

LENGTHS = (800, 9000)
NAME = re.compile(f"(?:{'|'.join(recall._ADJECTIVES)}) (?:{'|'.join(recall._NOUNS)})")


def quiet(message: str) -> None:
    pass


def prepare_with_questions(root, output, seed=0, lengths=LENGTHS):
    return prepare(
        [Source("text", root / "text.jsonl")],
        root / output,
        tokenizer=root / "tokenizer.json" if (root / "tokenizer.json").exists() else None,
        vocab_size=400,
        heldout_fraction=0.3,
        long_qa=[LongQA("text", 60_000, lengths, seed)],
        progress=quiet,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Text in lines, and samples made of it."""
    root = tmp_path_factory.mktemp("long_qa")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(3, 9))) for _ in range(60)]
    with (root / "text.jsonl").open("w") as file:
        for _ in range(60):
            lines = [" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(40)]
            file.write(json.dumps({"text": "\n".join(lines)}) + "\n")
    prepare_with_questions(root, "out")
    (root / "tokenizer.json").write_bytes((root / "out" / "tokenizer.json").read_bytes())
    return root


@pytest.fixture(scope="module", params=["train", "heldout"])
def samples(root, request):
    """Each sample's description and tokens, and the tokenizer."""
    folder = root / "out" / "text_qa" / request.param
    corpus = Corpus(folder)
    described = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    assert len(described) == len(corpus)
    tokens = [corpus.read(n, 0, int(length)) for n, length in enumerate(corpus.lengths)]
    return list(zip(described, tokens, strict=True)), Tokenizer.load(root / "out" / "tokenizer.json")


def test_answers_are_what_the_evidence_says(samples):
    found, tokenizer = samples
    for described, tokens in found:
        text = tokenizer.decode(tokens)
        for (start, stop), (evidence_start, evidence_stop) in zip(
            described["answers"], described["evidence"], strict=True
        ):
            assert evidence_stop <= start
            answer = tokenizer.decode(tokens[start:stop]).strip()
            evidence = tokenizer.decode(tokens[evidence_start:evidence_stop])
            question = tokenizer.decode(tokens[max(start - 60, 0) : start])
            assert answer
            if described["kind"] == "dialogue":
                assert answer == evidence.strip()
                # The passage was given under the name that is asked for.
                request = tokenizer.decode(tokens[max(evidence_start - 60, 0) : evidence_start])
                [name] = NAME.findall(question.splitlines()[-2])
                assert NAME.findall(request)[-1] == name
            else:
                assert answer in evidence
                # Only this evidence names what is asked for.
                named = [word for word in evidence.replace(answer, "").split() if word.strip("|:=.") in question]
                assert named
                assert text.count(answer) == 2


def test_lengths_kinds_and_depths(samples):
    found, _ = samples
    assert {described["kind"] for described, _ in found} == {"fact", "table", "dialogue"}
    for described, tokens in found:
        assert described["tokens"] == len(tokens)
        assert LENGTHS[0] <= len(tokens) <= LENGTHS[1]
        assert len(described["answers"]) == max(1, len(tokens) // 4096)
    depths = [start / described["tokens"] for described, _ in found for start, _ in described["evidence"]]
    if len(depths) > 10:
        assert np.histogram(depths, 3, (0, 1))[0].min() > len(depths) // 6


def test_only_answers_count(root):
    data = PreparedData(DataConfig(path=str(root / "out"), sequence_length=9000, batch_size=1, mixture=("text_qa=1",)))
    batches = data.training_batches(0, Share())
    folder = root / "out" / "text_qa" / "train"
    corpus = Corpus(folder)
    described = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    wanted = {corpus.read(n, 0, int(length)).tobytes(): described[n] for n, length in enumerate(corpus.lengths)}
    seen = 0
    for _ in range(8):
        row = {name: values[0] for name, values in next(batches).items()}
        for segment in range(1, row["segment_ids"].max() + 1):
            mine = row["segment_ids"] == segment
            sample = wanted[row["tokens"][mine].tobytes()]
            targets = np.zeros(mine.sum(), np.float32)
            for start, stop in sample["answers"]:
                targets[start - 1 : stop - 1] = 1  # Weights lie where the token before predicts.
            np.testing.assert_array_equal(row["weights"][mine], targets)
            seen += 1
    assert seen >= 8


def test_synthetic_sources_are_read_where_they_are_named(root):
    common = {"path": str(root / "out"), "sequence_length": 100, "batch_size": 2, "heldout_sequences": 4}
    batches = PreparedData(DataConfig(**common)).training_batches(0, Share())
    assert min(next(batches)["weights"].mean() for _ in range(50)) > 0.9
    mixed = PreparedData(DataConfig(**common, mixture=("text=9", "text_qa=1")))
    alone = PreparedData(DataConfig(**common))
    for batch, other in zip(mixed.heldout_batches(Share()), alone.heldout_batches(Share()), strict=True):
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])


def test_report_and_seed(root):
    report = json.loads((root / "out" / "dataset.json").read_text())["sources"]
    train = report["text_qa"]["train"]
    assert report["text_qa"]["synthetic"]
    assert train["tokens"] >= 60_000
    assert sum(train["kinds"].values()) == train["documents"]
    assert sum(bucket["tokens"] for bucket in train["buckets"].values()) == train["tokens"]
    assert "synthetic" not in report["text"]
    again = prepare_with_questions(root, "again")
    other = prepare_with_questions(root, "other", seed=1)

    def content(name):
        corpus = Corpus(root / name / "text_qa" / "train")
        return [corpus.read(n, 0, int(length)).tobytes() for n, length in enumerate(corpus.lengths)]

    assert content("again") == content("out") != content("other")
    assert again["sources"]["text_qa"] == report["text_qa"] != other["sources"]["text_qa"]


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (LongQA("txt"), "--long_qa=txt: no source of that name; did you mean 'text'"),
        (LongQA("text", lengths=(100, 1000)), "--long_qa_lengths=100,1000: give the shortest and the longest"),
        (LongQA("text", lengths=(2000, 1000)), "--long_qa_lengths=2000,1000"),
        (LongQA("text", tokens=-1), "--long_qa_tokens=-1 must not be negative"),
        (LongQA("text", lengths=(10**6, 10**7)), "less than a sample of 1,000,000: give more documents"),
    ],
)
def test_mistakes_are_named(root, wanted, sentence):
    with pytest.raises(ConfigError, match=sentence):
        prepare(
            [Source("text", root / "text.jsonl")],
            root / "wrong",
            tokenizer=root / "tokenizer.json",
            vocab_size=400,
            heldout_fraction=0.3,
            long_qa=[wanted],
            progress=quiet,
        )
    assert not (root / "wrong").exists()
