from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing import groups
from pipeline.packing.barriers import conflicts
from pipeline.packing.bm25.bags import Bags
from pipeline.packing.order import permutation


def neighbours(rows, k):
    """The exact neighbours by BM25 of all pairs."""
    bags = Bags.of(rows)
    count = len(rows)
    everyone = np.broadcast_to(np.arange(count), (count, count))
    scores = bags.score(np.arange(count), np.ascontiguousarray(everyone))
    np.fill_diagonal(scores, -1)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    found = np.take_along_axis(scores, ids.astype(np.int64), axis=1)
    return bags, np.where(found > 0, ids, -1).astype(np.int32), np.where(found > 0, found, 0).astype(np.float32)


def planted(pieces, documents=60, noise=0.5, seed=0):
    """Documents of own words cut into pieces, a share of the words from everywhere, shuffled: rows and the document of each."""
    draw = np.random.default_rng(seed)
    own = np.repeat(np.arange(documents), pieces)
    rows = 1000 + own[:, None] * 50 + draw.integers(0, 50, (len(own), 60))
    rows = np.where(draw.random(rows.shape) < noise, draw.integers(0, 1000, rows.shape), rows)
    order = draw.permutation(len(own))
    return rows[order], own[order]


def similarity(bags, grouped):
    return np.mean([bags.score(grouped[:, place], np.delete(grouped, place, axis=1)) for place in range(grouped.shape[1])])


def check_partition(grouped, count, size):
    assert grouped.dtype == np.int64
    assert grouped.shape == (-(-count // size), size)
    assert sorted(grouped[grouped >= 0]) == list(range(count))
    assert (grouped[:-1] >= 0).all()
    assert (np.diff(grouped[-1:] < 0, axis=1) >= 0).all()  # -1 at the end only


def test_a_documents_last_group_is_short():
    assert groups.consecutive(np.array([0, 0, 0, 2, 3, 3]), 2).tolist() == [[0, 1], [2, -1], [3, -1], [4, 5]]


def test_mixed_documents_run_on_into_one_another():
    assert groups.consecutive(np.array([0, 0, 0, 2, 3]), 2, mix_documents=True).tolist() == [[0, 1], [2, 3], [4, -1]]


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


def test_random_groups_hold_every_segment_once_and_follow_the_seed():
    assert groups.random(3, 1, 5).tolist() == [[0], [1], [2]]
    found = groups.random(10, 4, 5)
    assert found[2, 2:].tolist() == [-1, -1]
    assert sorted(found.reshape(-1)[:10]) == list(range(10))
    assert found.tolist() == groups.random(10, 4, 5).tolist() != groups.random(10, 4, 6).tolist()
    assert groups.random(0, 4, 5).shape == (0, 4)


problems = st.tuples(st.integers(0, 60), st.integers(1, 9), st.integers(0, 5), st.integers(0, 2**31).map(np.random.default_rng))
"""Segments, group size, neighbours, and what draws the rest."""


def arbitrary(count, k, draw):
    """Rows of few words, and lists of neighbours that nothing is true of but that they hold no segment twice, nor the segment itself."""
    bags = Bags.of(draw.integers(0, 30, (count, 12)))
    ids = np.full((count, k), -1, dtype=np.int32)
    for i in range(count):
        others = draw.permutation(np.delete(np.arange(count), i))[: draw.integers(0, k + 1)]
        ids[i, : len(others)] = others
    scores = bags.score(np.arange(count), ids) if count else np.zeros((0, k), dtype=np.float32)
    return bags, ids, scores


@settings(deadline=None)
@given(problems)
def test_every_segment_is_in_one_group_and_only_the_last_is_short(problem):
    count, size, k, draw = problem
    bags, ids, scores = arbitrary(count, k, draw)
    documents = draw.integers(0, max(count, 1), count)
    apart = draw.integers(0, max(count, 1), (count // 4, 2))
    for rules in ({}, {"documents": documents}, {"apart": apart}, {"documents": documents, "apart": apart}):
        check_partition(groups.chain(ids, size, 3, **rules), count, size)
        check_partition(groups.matching(bags, ids, scores, size, **rules), count, size)


@settings(deadline=None)
@given(problems, st.integers(1, 60))
def test_segments_of_one_document_never_share_a_group_where_that_can_be(problem, spread):
    count, size, k, draw = problem
    documents = draw.integers(0, spread, count)
    if count and np.bincount(documents).max() > count // size:
        return
    bags, ids, scores = arbitrary(count, k, draw)
    assert conflicts(groups.chain(ids, size, 3, documents=documents), documents) == 0
    assert conflicts(groups.matching(bags, ids, scores, size, documents=documents), documents) == 0


def test_a_document_with_too_many_segments_is_spread_as_evenly_as_can_be():
    bags, ids, scores = arbitrary(40, 5, np.random.default_rng(1))
    documents = np.where(np.arange(40) < 20, 0, np.arange(40))
    grouped = groups.matching(bags, ids, scores, 4, documents=documents)
    assert (documents[grouped] == 0).any(axis=1).all()
    assert conflicts(grouped, documents) >= 10  # 20 in 10 groups


def test_near_duplicates_are_kept_apart_also_by_way_of_others():
    rows, _ = planted(4)
    bags, ids, scores = neighbours(rows, 10)
    best = groups.matching(bags, ids, scores, 4)
    apart = best[:, :3].reshape(-1, 3)
    apart = np.concatenate([apart[:, :2], apart[:, 1:]])  # a - b and b - c
    for grouped in (groups.matching(bags, ids, scores, 4, apart=apart), groups.chain(ids, 4, 0, apart=apart)):
        assert conflicts(grouped, apart=apart) == 0
        assert not any(set(best[0, [0, 2]]) <= set(group) for group in grouped)
    assert conflicts(best, apart=apart) == 3 * len(best)


@pytest.mark.parametrize("size", [3, 4, 6, 12])
def test_planted_documents_are_found_again(size):
    rows, own = planted(size)
    grouped = groups.matching(*neighbours(rows, 20), size)
    together = (own[grouped][:, :, None] == own[grouped][:, None, :]).mean() * size - 1
    assert together >= 0.95 * (size - 1)


@pytest.mark.parametrize("size", [3, 6, 12])
def test_repeated_matching_alone_builds_groups_of_any_size_from_halves(size):
    rows, own = planted(size)
    grouped = groups.matching(*neighbours(rows, 20), size, passes=0)
    assert (own[grouped][:, :, None] == own[grouped][:, None, :]).mean() * size - 1 >= 0.7 * (size - 1)


def test_matching_has_more_bm25_in_its_groups_than_the_chain_and_swaps_add_to_it():
    rows, _ = planted(5, noise=0.7)
    bags, ids, scores = neighbours(rows, 8)
    found = [similarity(bags, groups.chain(ids, 4, 0))]
    found += [similarity(bags, groups.matching(bags, ids, scores, 4, passes=passes)) for passes in (0, 1, 5)]
    assert found[0] < found[1] < found[2] <= found[3]


def test_kept_apart_documents_still_group_with_what_is_like_them():
    rows, own = planted(8)
    bags, ids, scores = neighbours(rows, 20)
    # Each planted document is four real ones with two segments each.
    place = np.array([np.flatnonzero(np.flatnonzero(own == own[i]) == i)[0] for i in range(len(own))])
    documents = own * 4 + place % 4
    grouped = groups.matching(bags, ids, scores, 4, documents=documents)
    assert conflicts(grouped, documents) == 0
    assert ((own[grouped][:, :, None] == own[grouped][:, None, :]).mean() * 4 - 1) / 3 > 0.95


def test_the_same_input_gives_the_same_groups():
    rows, own = planted(5, noise=0.7)
    bags, ids, scores = neighbours(rows, 8)
    first, again = (groups.matching(bags, ids.copy(), scores.copy(), 4, documents=own) for _ in range(2))
    assert first.tobytes() == again.tobytes()


def plain_chain(ids, order, size, documents):
    """As Zhong et al. describe it, one group at a time."""
    left, walk = list(order), []
    while left:
        group = walk[len(walk) - len(walk) % size :]
        taken = {documents[i] for i in group}
        candidates = [j for j in ids[walk[-1]] if j in left] if walk else []
        following = next((j for j in [*candidates, *left] if documents[j] not in taken), left[0])
        left.remove(following)
        walk.append(following)
    return walk


@settings(deadline=None)
@given(problems)
def test_the_chain_is_trimes_walk(problem):
    count, size, k, draw = problem
    _, ids, _ = arbitrary(count, k, draw)
    found = groups.chain(ids, size, 3)
    assert found[found >= 0].tolist() == plain_chain(ids.tolist(), permutation(count, 3, 0), size, range(count))


def test_the_chain_passes_over_documents_that_its_group_has():
    ids = np.array([[1, 2], [0, 2], [3, 0], [2, 4], [5, -1], [4, -1]])
    documents = np.array([0, 0, 1, 1, 2, 2])
    order = permutation(6, 0, 0)
    found = groups.chain(ids, 3, 0, documents=documents)
    assert found.reshape(-1).tolist() == plain_chain(ids.tolist(), order, 3, documents)
    assert conflicts(found, documents) == 0


def test_without_any_neighbours_or_with_fewer_segments_than_a_group_there_are_groups_all_the_same():
    rows = np.zeros((5, 4), dtype=np.int32)
    nobody, nothing = np.full((5, 3), -1, dtype=np.int32), np.zeros((5, 3), dtype=np.float32)
    check_partition(groups.matching(Bags.of(rows), nobody, nothing, 2), 5, 2)
    check_partition(groups.chain(nobody, 2, 0), 5, 2)
    assert groups.matching(Bags.of(rows), nobody, nothing, 8).tolist() == [[0, 1, 2, 3, 4, -1, -1, -1]]
