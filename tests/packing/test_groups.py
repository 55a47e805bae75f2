from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing import groups


def test_a_documents_last_group_is_short():
    assert groups.consecutive(np.array([0, 0, 0, 2, 3, 3]), 2).tolist() == [[0, 1], [2, -1], [3, -1], [4, 5]]


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(2, 5))
def test_consecutive_groups_are_neighbours_of_one_document_in_order(counts, size):
    documents = np.repeat(np.arange(len(counts)), counts)
    found = groups.consecutive(documents, size)
    assert found.shape[1] == size
    assert found[found >= 0].tolist() == list(range(len(documents)))
    for group in found:
        members = group[group >= 0]
        assert len(set(documents[members])) == 1
        assert (group[: len(members)] == members).all()
    assert len(found) == sum(-(-count // size) for count in counts)


def test_singles_are_groups_of_one():
    assert groups.singles(3).tolist() == [[0], [1], [2]]
