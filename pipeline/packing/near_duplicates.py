"""Segments that are nearly the same, found among BM25 neighbours and by hash.

The measure is the weighted Jaccard similarity of two bags of terms, sum(min(tf)) / sum(max(tf)). A near-duplicate is among a segment's
nearest neighbours unless there are more copies than neighbours; identical copies, the one thing that comes in thousands, are
found without neighbours.
"""

from __future__ import annotations

import numba
import numpy as np
from numba.typed import List
from numpy.typing import NDArray

from pipeline.packing.bm25.bags import Bags
from pipeline.packing.segments import Ints

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


def pairs(bags: Bags, ids: NDArray[np.integer], overlap: float) -> Ints:
    """Neighbours with a weighted Jaccard similarity of at least `overlap`: int64 [E, 2], i < j, each pair once, rising.

    ids: [N, k] neighbours, -1 where missing. Terms that only one segment has are not in the bags and do not count.
    """
    found = _pairs(bags.offsets, bags.terms, bags.counts, np.ascontiguousarray(ids, dtype=np.int32), len(bags.idf), overlap)
    return found[np.lexsort((found[:, 1], found[:, 0]))]


def exact(bags: Bags) -> Ints:
    """Segments with the very bag and length of an earlier one: int64 [E, 2], (the first, the copy), by hash and then compared in full.

    Segments without a term in common with any other are left out: nothing can be told about them.
    """
    hashes = _hashes(bags.offsets, bags.terms, bags.counts)
    order = np.lexsort((np.arange(len(hashes)), hashes))
    first = np.arange(len(hashes))
    _firsts(bags.offsets, bags.terms, bags.counts, bags.norms, hashes, order, first)
    copy = np.flatnonzero(first != np.arange(len(first)))
    return np.stack([first[copy], copy], axis=1)


def removed(count: int, pairs: Ints, exact: Ints) -> NDArray[np.bool_]:
    """Which segments to leave out: bool [count], those with an earlier near-duplicate that stays, and all exact copies.

    pairs, exact: int64 [E, 2] of the functions of these names. What is near to a copy is near to the first of its kind.
    """
    first = np.arange(count)
    first[exact[:, 1]] = exact[:, 0]
    between = np.sort(first[pairs], axis=1)
    between = between[between[:, 0] < between[:, 1]]
    drop = _removed(count, between[np.argsort(between[:, 1], kind="stable")])
    drop[exact[:, 1]] = True
    return drop


@_jit
def _pairs(offsets, terms, counts, ids, vocabulary, overlap):  # type: ignore[no-untyped-def]
    tf = np.zeros(vocabulary, dtype=np.int64)
    lengths = np.zeros(len(ids), dtype=np.int64)
    for i in range(len(ids)):
        lengths[i] = counts[offsets[i] : offsets[i + 1]].astype(np.int64).sum()
    near_by, near_to = List.empty_list(numba.int64), List.empty_list(numba.int64)
    for i in range(len(ids)):
        tf[terms[offsets[i] : offsets[i + 1]]] = counts[offsets[i] : offsets[i + 1]]
        for j in ids[i]:
            if j < 0 or (j < i and (ids[j] == i).any()):
                continue
            # min + max = both lengths, so min / max >= overlap where the terms of j that i lacks are few; rare terms, the last, tell soonest.
            lost, may_lose = 0, lengths[j] - overlap / (1 + overlap) * (lengths[i] + lengths[j]) + 1e-9
            for at in range(offsets[j + 1] - 1, offsets[j] - 1, -1):
                lost += max(0, counts[at] - tf[terms[at]])
                if lost > may_lose:
                    break
            if lost <= may_lose and lengths[j] > 0:
                near_by.append(min(i, j))
                near_to.append(max(i, j))
        tf[terms[offsets[i] : offsets[i + 1]]] = 0
    found = np.empty((len(near_by), 2), dtype=np.int64)
    for place in range(len(found)):
        found[place, 0], found[place, 1] = near_by[place], near_to[place]
    return found


@_jit
def _hashes(offsets, terms, counts):  # type: ignore[no-untyped-def]
    """64-bit FNV-1a over terms and counts."""
    hashes = np.empty(len(offsets) - 1, dtype=np.uint64)
    for i in range(len(hashes)):
        value = np.uint64(0xCBF29CE484222325)
        for at in range(offsets[i], offsets[i + 1]):
            value = (value ^ np.uint64(terms[at])) * np.uint64(0x100000001B3)
            value = (value ^ np.uint64(counts[at])) * np.uint64(0x100000001B3)
        hashes[i] = value
    return hashes


@_jit
def _firsts(offsets, terms, counts, norms, hashes, order, first):  # type: ignore[no-untyped-def]
    begin = 0
    for place in range(len(order)):
        i = order[place]
        if hashes[i] != hashes[order[begin]]:
            begin = place
        here = slice(offsets[i], offsets[i + 1])
        for other in order[begin:place]:
            there = slice(offsets[other], offsets[other + 1])
            if first[other] != other or here.stop - here.start != there.stop - there.start or norms[i] != norms[other] or here.stop == here.start:
                continue
            if (terms[here] == terms[there]).all() and (counts[here] == counts[there]).all():
                first[i] = other
                break


@_jit
def _removed(count, between):  # type: ignore[no-untyped-def]
    drop = np.zeros(count, dtype=np.bool_)
    for i, j in between:  # by rising j, so that i's own fate is known
        drop[j] |= not drop[i]
    return drop
