"""Segments that must not share a group: those of one document, and near-duplicates of one another."""

from __future__ import annotations

import numba
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pipeline.packing.segments import Ints

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


def labels(count: int, documents: Ints | None, apart: Ints | None) -> Ints:
    """int64 [count, 2]: the document, and the cluster of near-duplicates, of each segment; -1 where none. Equal labels must not meet.

    apart: int64 [E, 2] pairs. What they connect, also by way of others, is one cluster: thousands of copies need no pair for every two of them.
    """
    found = np.full((count, 2), -1, dtype=np.int64)
    if documents is not None:
        found[:, 0] = np.unique(documents, return_inverse=True)[1]
    if apart is not None and len(apart):
        pairs = np.asarray(apart, dtype=np.int64)
        graph = coo_matrix((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), (count, count))
        clusters = connected_components(graph, directed=False)[1]
        found[:, 1] = np.where(np.bincount(clusters)[clusters] > 1, clusters, -1)
    return found


def conflicts(groups: Ints, documents: Ints | None = None, apart: Ints | None = None) -> int:
    """How many pairs share a group that must not: of one document, or of one cluster of near-duplicates."""
    return int(_conflicts(groups, labels(int(groups.max(initial=-1)) + 1, documents, apart)))


@_jit
def forbidden(i, j, labels):  # type: ignore[no-untyped-def]
    return (labels[i, 0] >= 0 and labels[i, 0] == labels[j, 0]) or (labels[i, 1] >= 0 and labels[i, 1] == labels[j, 1])


@_jit
def clashes(i, group, leaving, labels):  # type: ignore[no-untyped-def]
    """Members of the group, but for i itself and the one `leaving`, that i must not share it with."""
    found = 0
    for j in group:
        if j >= 0 and j != i and j != leaving and forbidden(i, j, labels):
            found += 1
    return found


@_jit
def _conflicts(groups, labels):  # type: ignore[no-untyped-def]
    found = 0
    for group in groups:
        for i in group:
            if i >= 0:
                found += clashes(i, group, -1, labels)
    return found // 2


@_jit
def repair(groups, labels):  # type: ignore[no-untyped-def]
    """Swap segments that must not share a group with others far away, as long as that lessens the number of forbidden pairs.

    With documents alone it ends at none where no document has more segments than there are full groups. For a group A that
    holds one twice leaves another, B, without it; and were no swap with a member of B to help, the rest of A would hold as many
    segments of each document as B does, one more than it has places for.
    """
    hopeless = np.zeros((labels.max() + 1 if len(labels) and labels.max() >= 0 else 0, 2), dtype=np.bool_)  # labels that every full group has
    cursor, improved = 0, True
    while improved:
        improved = False
        for here in range(len(groups)):
            for place in range(groups.shape[1]):
                i = groups[here, place]
                if i < 0 or clashes(i, groups[here], -1, labels) == 0:
                    continue
                if (labels[i, 0] >= 0 and hopeless[labels[i, 0], 0]) or (labels[i, 1] >= 0 and hopeless[labels[i, 1], 1]):
                    continue
                there, slot = _better_place(i, here, groups, labels, cursor, hopeless)
                if there >= 0:
                    groups[here, place], groups[there, slot] = groups[there, slot], i
                    cursor, improved = there, True


@_jit
def _better_place(i, here, groups, labels, cursor, hopeless):  # type: ignore[no-untyped-def]
    """The first (group, slot) from the cursor on, with whose segment i can change places for fewer forbidden pairs; or -1, -1."""
    before = clashes(i, groups[here], -1, labels)
    room = np.zeros(2, dtype=np.bool_)
    for step in range(len(groups)):
        there = (cursor + step) % len(groups)
        if there == here:
            continue
        for label in range(2):
            lacks = groups[there, -1] >= 0
            for j in groups[there]:
                lacks = lacks and labels[i, label] != labels[j, label]
            room[label] |= lacks
        for slot in range(groups.shape[1]):
            j = groups[there, slot]
            if j < 0:
                break
            gain = before - clashes(i, groups[there], j, labels)
            if gain > 0:
                gain += clashes(j, groups[there], -1, labels) - clashes(j, groups[here], i, labels)
            if gain > 0:
                return there, slot
    for label in range(2):
        if labels[i, label] >= 0 and not room[label]:
            hopeless[labels[i, label], label] = True
    return -1, -1
