from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import segments

lengths = st.lists(st.integers(0, 30), max_size=20).map(lambda values: np.array(values, dtype=np.int64))


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
