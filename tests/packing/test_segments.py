from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing import segments

lengths = st.lists(st.integers(0, 30), max_size=20).map(lambda values: np.array(values, dtype=np.int64))
compiles = settings(deadline=None)


def rows(cut):
    """The (document, position) of every token, segment by segment."""
    bounds = zip(cut.offsets[:-1], cut.offsets[1:], strict=True)
    return [[(d, s + i) for d, s, n in cut.pieces[a:b].tolist() for i in range(n)] for a, b in bounds]


def test_across_cuts_the_example_of_its_docstring():
    cut = segments.across(np.array([3, 4, 2]), 5)
    assert cut.pieces.tolist() == [[0, 0, 3], [1, 0, 2], [1, 2, 2], [2, 0, 2]]
    assert cut.offsets.tolist() == [0, 2, 4]


@given(lengths, st.integers(1, 12))
def test_across_covers_every_token_once_in_order_in_full_rows(lengths, size):
    cut = segments.across(lengths, size)
    tokens = [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    assert [token for row in rows(cut) for token in row] == tokens
    assert all(len(row) == size for row in rows(cut)[:-1])
    assert cut.dropped == 0
    assert (cut.pieces[:, 2] > 0).all()


@given(lengths, st.integers(1, 12), st.integers(1, 12))
def test_within_keeps_documents_apart_and_drops_only_short_tails(lengths, size, min_tokens):
    cut = segments.within(lengths, size, min_tokens)
    expected = [[(d, i) for i in range(start, min(start + size, n))] for d, n in enumerate(lengths) for start in range(0, n, size)]
    kept = [row for row in expected if len(row) == size or len(row) >= min_tokens]
    assert rows(cut) == kept
    assert cut.dropped == lengths.sum() - sum(map(len, kept))


def reference(sizes, size):
    """Best-fit decreasing, as it is defined: the contents of each row."""
    filled = []
    for piece in sorted(sizes, reverse=True):
        fitting = [row for row in filled if sum(row) + piece <= size]
        if fitting:
            max(fitting, key=sum).append(piece)
        else:
            filled.append([piece])
    return filled


def test_best_fit_packs_the_example_of_its_docstring():
    cut = segments.best_fit(np.array([3, 12, 2]), 5)
    assert cut.pieces.tolist() == [[0, 0, 3], [1, 10, 2], [1, 0, 5], [1, 5, 5], [2, 0, 2]]
    assert cut.offsets.tolist() == [0, 2, 3, 4, 5]


@compiles
@given(lengths, st.integers(1, 40))
def test_best_fit_keeps_every_token_once_and_cuts_only_documents_longer_than_a_row(lengths, size):
    cut = segments.best_fit(lengths, size)
    assert sorted(token for row in rows(cut) for token in row) == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    assert all(0 < len(row) <= size for row in rows(cut))
    assert len(cut.pieces) == sum(-(-n // size) for n in lengths), "a document is in more pieces than its length needs"
    assert cut.dropped == 0


@compiles
@given(st.integers(1, 3000), st.lists(st.floats(0, 1.5), max_size=60))
def test_best_fit_fills_rows_as_best_fit_decreasing_is_defined_to(size, fractions):
    cut = segments.best_fit((size * np.array(fractions)).astype(np.int64), size)
    contents = np.split(cut.pieces[:, 2], cut.offsets[1:-1]) if len(cut.pieces) else []
    filled = sorted(map(sum, contents))
    assert filled == sorted(map(sum, reference(cut.pieces[:, 2].tolist(), size)))  # whichever of two equal rows a piece goes into
    assert len(filled) < 2 or filled[0] + filled[1] > size, "two rows would go into one"


@compiles
@given(lengths, st.integers(1, 40))
def test_best_fit_numbers_rows_by_their_first_piece_and_keeps_the_cut_ones_of_a_document_together(lengths, size):
    cut = segments.best_fit(lengths, size)
    first = cut.pieces[cut.offsets[:-1], :2].tolist()
    assert first == sorted(first)
    for document in np.flatnonzero(lengths >= size):
        full = np.flatnonzero((cut.pieces[:, 0] == document) & (cut.pieces[:, 2] == size))
        assert (np.diff(full) == 1).all()
