"""The corpus on disk and packed rows over it, against brute force."""

from pathlib import Path

import numpy as np
import pytest

from mmx.config import ConfigError
from mmx.data import corpus as corpus_module
from mmx.data.corpus import Corpus, CorpusWriter
from mmx.data.packing import PackedRows

LENGTHS = [5, 1, 130, 7, 64, 2, 33, 90]


def write(folder: Path, lengths=LENGTHS, vocab_size=1000) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, length) for length in lengths]
    writer = CorpusWriter(folder, vocab_size)
    for document in documents:
        writer.add(document)
    assert writer.close() == {"documents": len(lengths), "tokens": sum(lengths)}
    return documents


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces and shards so small that documents span them."""
    monkeypatch.setattr(corpus_module, "PIECE", 16)
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 100)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("vocab_size", [1000, 100_000])
def test_any_window_of_a_document(tmp_path, vocab_size):
    documents = write(tmp_path / "c", vocab_size=vocab_size)
    corpus = Corpus(tmp_path / "c")
    assert len(corpus) == len(LENGTHS)
    assert len(list((tmp_path / "c").glob("shard-*"))) > 1
    for number, document in enumerate(documents):
        for start in range(0, len(document), 7):
            for stop in range(start + 1, len(document) + 1, 5):
                np.testing.assert_array_equal(corpus.read(number, start, stop), document[start:stop])


def test_damage_is_found_when_opened(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing holds no prepared documents: run launch\.prepare"):
        Corpus(tmp_path / "nothing")
    write(tmp_path / "c")
    shard = tmp_path / "c" / "shard-00000.array_record"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ConfigError, match=r"shard-00000\.array_record has .* bytes instead of"):
        Corpus(tmp_path / "c")
    shard.unlink()
    with pytest.raises(ConfigError, match=r"shard-00000\.array_record is missing"):
        Corpus(tmp_path / "c")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("S", [2, 10, 64, 200])
def test_rows_are_the_stream_cut_up(tmp_path, S, seed):
    documents = write(tmp_path / "c")
    rows = PackedRows(Corpus(tmp_path / "c"), S, seed)
    order = range(len(documents)) if seed is None else np.random.default_rng(seed).permutation(len(documents))
    stream = np.concatenate([documents[n] for n in order])
    owner = np.concatenate([np.full(len(documents[n]), n) for n in order])
    assert len(rows) == len(stream) // S
    predicted = np.zeros(len(stream), int)
    for r in range(len(rows)):
        row = rows[r]
        here = np.arange(r * S, (r + 1) * S)
        assert {name: values.shape for name, values in row.items()} == dict.fromkeys(row, (S,))
        np.testing.assert_array_equal(row["tokens"], stream[here])
        # Segments number the documents in the row from 1, positions restart with each.
        segments = 1 + np.cumsum(np.diff(owner[here], prepend=owner[here[0]]) != 0)
        np.testing.assert_array_equal(row["segment_ids"], segments)
        for segment in np.unique(segments):
            count = np.sum(segments == segment)
            np.testing.assert_array_equal(row["positions"][segments == segment], np.arange(count))
        for place, n in enumerate(here):
            has_target = n + 1 < len(stream) and owner[n + 1] == owner[n]
            assert row["weights"][place] == has_target
            if has_target:
                assert row["targets"][place] == stream[n + 1]
                predicted[n + 1] += 1
    # Every token is predicted once, but the first of each document and what does not fill a last row.
    first = np.diff(owner, prepend=-1) != 0
    covered = np.arange(len(stream)) <= len(rows) * S
    np.testing.assert_array_equal(predicted, ~first & covered)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("whole", [False, True])
def test_only_spans_count(tmp_path, whole):
    spans = [[(1, 3), (4, 5)], [], [(0, 1), (17, 40), (100, 130)]]
    lengths = [5, 40, 130]
    writer = CorpusWriter(tmp_path / "c", 1000)
    for number, (length, counted) in enumerate(zip(lengths, spans, strict=True)):
        writer.add([number] * length, counted=counted)
    writer.close()
    rows = PackedRows(Corpus(tmp_path / "c"), 24, None, whole=whole)
    got = [0, 0, 0]
    for row in (rows[n] for n in range(len(rows))):
        assert set(row["weights"]) <= {0, 1}
        for number in range(3):
            got[number] += int(row["weights"][(row["tokens"] == number) & (row["segment_ids"] > 0)].sum())
    # A document's first token is no target; nor are, in a stream, the last tokens, which fill no row, but their first.
    left_out = 0 if whole else sum(lengths) % 24 - 1
    assert got == [3, 0, 23 + 30 - left_out]
    (tmp_path / "c" / "counted_spans.npy").unlink()
    with pytest.raises(ConfigError, match=r"counted_spans\.npy is missing: restore it"):
        Corpus(tmp_path / "c")
    mixed = CorpusWriter(tmp_path / "mixed", 1000)
    mixed.add([1, 2])
    mixed.add([1, 2], counted=[(0, 2)])
    with pytest.raises(ValueError, match="1 of 2 documents have spans"):
        mixed.close()


def test_corpus_shorter_than_a_row_is_padded(tmp_path):
    documents = write(tmp_path / "c", lengths=[4, 3])
    rows = PackedRows(Corpus(tmp_path / "c"), 10, None)
    assert len(rows) == 1
    row = rows[0]
    np.testing.assert_array_equal(row["tokens"], [*documents[0], *documents[1], 0, 0, 0])
    np.testing.assert_array_equal(row["segment_ids"], [1] * 4 + [2] * 3 + [0] * 3)
    np.testing.assert_array_equal(row["weights"], [1, 1, 1, 0, 1, 1, 0, 0, 0, 0])
