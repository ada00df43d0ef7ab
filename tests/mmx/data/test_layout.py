"""Documents laid out whole: every token once, nothing cut that fits."""

import numpy as np
import pytest

from mmx.data.layout import Stream, Whole

LENGTHS = np.asarray([5, 64, 130, 7, 65, 63, 1, 300, 33, 31, 90, 128])


@pytest.mark.parametrize("S", [1, 8, 64, 200, 1000])
@pytest.mark.parametrize("layout", [Stream, Whole])
def test_every_token_is_in_one_row(layout, S):
    documents = np.random.default_rng(0).permutation(len(LENGTHS)) + 100
    laid_out = layout(documents, LENGTHS[documents - 100], S)
    rows = [laid_out.pieces(row) for row in range(len(laid_out))]
    assert all(sum(piece.stop - piece.start for piece in row) <= S for row in rows)
    seen = {document: np.zeros(LENGTHS[document - 100], int) for document in documents}
    for document, start, stop in (piece for row in rows for piece in row):
        assert start < stop
        seen[document][start:stop] += 1
    counts = np.concatenate(list(seen.values()))
    assert counts.max() == 1
    assert counts.sum() == laid_out.tokens
    assert LENGTHS.sum() - counts.sum() < (S if layout is Stream and len(rows) > 1 else 1)


@pytest.mark.parametrize("S", [8, 64, 200])
def test_whole_documents_are_not_cut_short(S):
    documents = np.arange(len(LENGTHS))
    laid_out = Whole(documents, LENGTHS, S)
    for row in range(len(laid_out)):
        pieces = laid_out.pieces(row)
        for document, start, stop in pieces:
            # As long as the row allows, or to the document's end; a row's worth apart from its start.
            assert stop - start == min(S, LENGTHS[document] - start)
            assert start % S == 0
        sizes = [piece.stop - piece.start for piece in pieces]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("S", [50_000, 2**20])
def test_rows_are_filled(S):
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(S / 64), np.log(4 * S), 5000)).astype(int)
    laid_out = Whole(np.arange(len(lengths)), lengths, S)
    assert laid_out.tokens / (len(laid_out) * S) > 0.98


def test_best_fit():
    def packed(*lengths: int) -> list[list[int]]:
        laid_out = Whole(np.arange(len(lengths)), np.asarray(lengths), 10)
        return [[lengths[piece.document] for piece in laid_out.pieces(row)] for row in range(len(laid_out))]

    assert packed(3, 6, 7, 4) == [[7, 3], [6, 4]]
    assert packed(6, 5, 4, 3, 2) == [[6, 4], [5, 3, 2]]
