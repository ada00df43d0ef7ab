"""Byte-level BPE: exact round trips, special tokens, sizes in bytes."""

import pytest

from mmx.config import ConfigError
from mmx.data import tokenizer as tokenizer_module
from mmx.data.tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, Tokenizer

TEXTS = ["def main():\n    return 'naïve ☃'\n", "    x = 1\n\n\n", "привет, мир", "\x00\x7f\t tabs"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS * 5, 320)


def test_round_trip(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        for text in [*TEXTS, "unseen: 你好 \U0001f600", ""]:
            assert each.decode(each.encode(text)) == text
        assert each.encode_batch(TEXTS) == [each.encode(text) for text in TEXTS]


def test_long_texts_are_tokenized_in_parts_as_in_one(tokenizer, monkeypatch):
    texts = ["".join(TEXTS) * 9, "", "one line " * 40, "\n" * 70 + "\n  \n x" * 20, "é" * 100 + "\nend"]
    want = tokenizer.encode_batch(texts)
    vocabulary = Tokenizer.train(texts[:1], 320)._inner.to_str()
    monkeypatch.setattr(tokenizer_module, "_PART_CHARACTERS", 64)
    monkeypatch.setattr(tokenizer_module, "_BATCH_CHARACTERS", 100)
    got = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in got] == texts
    # Where a part has no break it is cut within a line, and only there tokens may differ.
    assert (got[0], got[1], got[4][-4:]) == (want[0], want[1], want[4][-4:])
    assert Tokenizer.train(texts[:1], 320)._inner.to_str() == vocabulary


def test_bytes_of_tokens_add_up(tokenizer):
    sizes = tokenizer.token_bytes()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert sizes[ids].sum() == len(text.encode())
        assert b"".join(tokenizer.token_text(i) for i in ids) == text.encode()
    assert sizes[tokenizer.end_of_document] == 0
    assert tokenizer.token_text(tokenizer.end_of_document) == b""
    assert tokenizer.token_text(tokenizer.vocab_size + 5) == b""


def test_special_tokens_come_last_and_are_not_read_from_text(tokenizer):
    assert tokenizer.vocab_size <= 320
    assert tokenizer.end_of_document >= tokenizer.vocab_size - len(SPECIAL_TOKENS)
    ids = tokenizer.encode("a <end_of_document> b")
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == "a <end_of_document> b"
    assert tokenizer.decode([tokenizer.begin_of_document, *tokenizer.encode("x"), tokenizer.end_of_document]) == "x"


def test_released_size_is_possible():
    # With too little text for so many merges the tokenizer is smaller, and still works.
    tokenizer = Tokenizer.train(TEXTS, 200_064)
    assert SMALLEST_VOCABULARY < tokenizer.vocab_size <= 200_064
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size=100 is too small"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match="lacks <begin_of_document>"):
        Tokenizer.load(tmp_path / "other.json")
