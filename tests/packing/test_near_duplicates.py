from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing import near_duplicates
from pipeline.packing.bm25.bags import Bags

NONE = np.empty((0, 2), dtype=np.int64)


def jaccard(a, b):
    a, b = Counter(a), Counter(b)
    return sum((a & b).values()) / max(sum((a | b).values()), 1)


def everyone(count):
    return np.array([[j for j in range(count) if j != i] for i in range(count)], dtype=np.int32).reshape(count, -1)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=2, max_size=8), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_pairs_are_those_whose_weighted_jaccard_reaches_the_overlap(rows, overlap):
    rows = rows + rows[:1] + [[0, 1, 2, 3, 4]] * 2  # every term is in two segments at least, so that bags hold them all
    found = near_duplicates.pairs(Bags.of([np.array(row) for row in rows]), everyone(len(rows)), overlap)
    expected = [[i, j] for i in range(len(rows)) for j in range(i + 1, len(rows)) if jaccard(rows[i], rows[j]) >= overlap]
    assert found.tolist() == expected


def test_a_pair_is_found_from_either_side_and_missing_neighbours_are_passed_over():
    bags = Bags.of([np.array([0, 1, 2])] * 2 + [np.array([5, 6])] * 2)
    assert near_duplicates.pairs(bags, np.array([[-1, -1], [0, -1], [-1, -1], [2, 0]]), 0.8).tolist() == [[0, 1], [2, 3]]


def test_thousands_of_copies_are_found_without_neighbours():
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 500, (4000, 30))
    rows[1::2] = rows[1]
    rows[10] = rows[4]
    found = near_duplicates.exact(Bags.of(rows))
    assert sorted(map(tuple, found.tolist())) == sorted([(1, i) for i in range(3, 4000, 2)] + [(4, 10)])


def test_the_order_of_terms_makes_no_other_segment_but_their_number_does():
    bags = Bags.of([np.array(row) for row in ([1, 2, 2], [2, 1, 2], [1, 2, 1], [1, 2, 2, 9])])
    assert near_duplicates.exact(bags).tolist() == [[0, 1]]


def test_a_hash_collision_is_no_copy(monkeypatch):
    monkeypatch.setattr(near_duplicates, "_hashes", lambda offsets, terms, counts: np.zeros(len(offsets) - 1, dtype=np.uint64))
    bags = Bags.of(np.array([[1, 2], [3, 4], [1, 2], [3, 4], [1, 3]]))
    assert near_duplicates.exact(bags).tolist() == [[0, 2], [1, 3]]


def test_segments_of_terms_that_no_other_has_are_no_copies():
    assert near_duplicates.exact(Bags.of(np.array([[1, 2], [3, 4], [5, 6]]))).tolist() == []


def test_the_lowest_of_a_cluster_stays_and_what_is_near_only_to_a_dropped_one_too():
    chain = np.array([[0, 1], [1, 2], [2, 3], [5, 6]])
    assert np.flatnonzero(near_duplicates.removed(7, chain, NONE)).tolist() == [1, 3, 6]


def test_copies_of_a_dropped_segment_are_dropped_with_it():
    # 1 is near 0; 2 and 3 are copies of 1, whose own lists hold only copies; 4 is near to the copy 3
    drop = near_duplicates.removed(5, np.array([[0, 1], [3, 4]]), np.array([[1, 2], [1, 3]]))
    assert np.flatnonzero(drop).tolist() == [1, 2, 3]
    drop = near_duplicates.removed(5, np.array([[3, 4]]), np.array([[1, 2], [1, 3]]))
    assert np.flatnonzero(drop).tolist() == [2, 3, 4]


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_near_nothing_removed(count):
    assert near_duplicates.removed(count, NONE, NONE).tolist() == [False] * count
    bags = Bags.of(np.arange(2 * count).reshape(count, 2))
    assert near_duplicates.pairs(bags, np.full((count, 4), -1), 0.8).shape == (0, 2)
    assert near_duplicates.exact(bags).shape == (0, 2)
