"""Which segments share a memory in training."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.packing import matching as kernels
from pipeline.packing.barriers import clashes, labels, repair
from pipeline.packing.bm25.bags import Bags
from pipeline.packing.order import permutation
from pipeline.packing.segments import Ints

TRIES = 64
"""Segments tried, where the walk has to jump, until its group takes the next."""


def random(count: int, size: int, seed: int) -> Ints:
    """Any segments together: int64 [G, size], the last short (-1); groups of one are in order, since epochs shuffle groups."""
    return _cut(np.arange(count, dtype=np.int64) if size == 1 else permutation(count, seed, 0), size)


def consecutive(documents: Ints, size: int, *, mix_documents: bool = False) -> Ints:
    """`size` neighbours in order: int64 [G, size], -1 where a group is short.

    documents: int64 [N], the document of each segment; those of one document stand together.
    mix_documents: let a group run on into the next document, so that only the last is short; otherwise each document's last one may be.
    """
    numbers = np.arange(len(documents), dtype=np.int64)
    if mix_documents:
        return _cut(numbers, size)
    begins = np.diff(documents, prepend=-1) != 0
    place = numbers - np.maximum.accumulate(np.where(begins, numbers, 0))
    slot = place % size
    group = np.cumsum(slot == 0) - 1
    groups = np.full((int(group[-1]) + 1 if len(group) else 0, size), -1, dtype=np.int64)
    groups[group, slot] = numbers
    return groups


def chain(ids: NDArray[np.integer], size: int, seed: int, *, documents: Ints | None = None, apart: Ints | None = None) -> Ints:
    """TRIME's walk (Zhong et al. 2022), cut into groups: int64 [G, size], the last one short (-1).

    From the first segment of a seeded permutation, always to the nearest neighbour not yet visited, or where there is none
    to the next of the permutation. ids: [N, k], neighbours by falling score, -1 where missing.
    documents, apart: as in `matching`; the walk passes over what its present group must not take.
    """
    barriers = labels(len(ids), documents, apart)
    groups = _cut(_walk(np.ascontiguousarray(ids, dtype=np.int32), permutation(len(ids), seed, 0), size, barriers), size)
    repair(groups, barriers)
    return groups


def matching(
    bags: Bags,
    ids: NDArray[np.integer],
    scores: NDArray[np.float32],
    size: int,
    *,
    documents: Ints | None = None,
    apart: Ints | None = None,
    passes: int = 2,
) -> Ints:
    """Groups with the most BM25 inside: int64 [G, size], every segment in one; the last is short (-1) where `size` does not divide N.

    ids: [N, k], scores: float32 [N, k]: neighbours by falling score and BM25 with them, -1 where missing.
    documents: int64 [N]; two segments of one document never share a group, unless a document has more segments than there are full groups.
    apart: int64 [E, 2], near-duplicates: what these pairs connect is kept apart too. `barriers.conflicts` counts what had to meet.
    passes: of swaps over all groups at most; each later one gains less and costs less.
    A function of its arguments; one thread, about 0.1 ms a segment (8 in a group, 256 words), memory O(N (k + size)).
    """
    count = len(ids)
    if size == 1 or count <= size:
        return _cut(np.arange(count, dtype=np.int64), size)
    barriers = labels(count, documents, apart)
    graph = kernels.graph(bags, np.ascontiguousarray(ids, dtype=np.int32), np.ascontiguousarray(scores, dtype=np.float32), barriers)
    # The short group takes those with the least to gain; swaps go on among the full groups.
    order = np.argsort(graph.strength, kind="stable")
    loners, rest = np.sort(order[: count % size]), np.sort(order[count % size :])
    groups = np.concatenate([kernels.build(graph, rest, size, barriers), _cut(loners, size)])
    repair(groups, barriers)
    full = groups[: count // size]
    kernels.refine(bags, graph, full, barriers, passes)
    full.sort(axis=1)
    groups[: len(full)] = full[np.argsort(full[:, 0])]
    return groups


def _cut(numbers: Ints, size: int) -> Ints:
    groups = np.full((-(-len(numbers) // size), size), -1, dtype=np.int64)
    groups.reshape(-1)[: len(numbers)] = numbers
    return groups


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _walk(ids, order, size, labels):  # type: ignore[no-untyped-def]
    walk = np.empty(len(order), dtype=np.int64)
    visited = np.zeros(len(order), dtype=np.bool_)
    unseen = 0
    for step in range(len(order)):
        group = walk[step - step % size : step]
        following = -1
        if step:
            for j in ids[walk[step - 1]]:
                if j >= 0 and not visited[j] and clashes(j, group, -1, labels) == 0:
                    following = j
                    break
        if following < 0:
            while visited[order[unseen]]:
                unseen += 1
            following = order[unseen]
            tries = 0
            for place in range(unseen, len(order)):
                if visited[order[place]]:
                    continue
                if clashes(order[place], group, -1, labels) == 0:
                    following = order[place]
                    break
                tries += 1
                if tries == TRIES:
                    break
        visited[following] = True
        walk[step] = following
    return walk
