"""Groups of segments with the most BM25 inside.

The objective is the sum over pairs (i, j) of a group of w(i, j) = score(i, j) + score(j, i). Only a segment's neighbours are known
beforehand; a pair in neither list is worth at most last(i) + last(j), the scores of the last neighbours, and is taken for CLOSE times that.
Every segment has the same number of partners, so that subtracting the estimate from all pairs changes no comparison: what remains is
a sparse graph of *excess* weights, zero where nothing is known. Groups are built on it by greedy matching of singles to pairs, pairs to fours and so
on (for any size, in halves), then improved two groups at a time, on exact scores, by the swaps of Kernighan & Lin (1970, "An efficient
heuristic procedure for partitioning graphs"). Pairs that must not share a group weigh -FORBIDDEN there, so that no swap brings them together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.packing.barriers import clashes, forbidden
from pipeline.packing.bm25.bags import Bags
from pipeline.packing.segments import Ints

CLOSE = 0.75
"""Score of a pair outside the neighbour lists, as a share of the lists' last scores."""
PARTNERS = 32
"""Groups, the most promising, that a group is tried with in one pass."""
SLACK = 0.4
"""How bad the first of several swaps may be, as a share of the mean weight of a neighbour, for the others to be tried."""
FORBIDDEN = 1e9
LEAST = 1e-4
"""Gain from which swaps are made, in the same unit: above what float32 sums round away, lest two groups swap for ever."""
TRIES = 64
"""Parts tried for one that has no neighbour left, until it must not share a group with none of them."""

LANES = 8

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@dataclass(frozen=True)
class Graph:
    """Neighbours in either direction that may share a group.

    starts: int64 [N + 1] into neighbours and excess; neighbours: int32 [E]; excess: float32 [E], w(i, j) - last(i) - last(j);
    last: float32 [N], CLOSE times the score of each segment's last neighbour, 0 where its list is not full; unit: the mean w of an edge.
    """

    starts: Ints
    neighbours: NDArray[np.int32]
    excess: NDArray[np.float32]
    last: NDArray[np.float32]
    unit: float

    @property
    def strength(self) -> NDArray[np.float64]:
        """float64 [N]: the sum of the positive excess at each segment."""
        count = len(self.last)
        totals = np.bincount(np.repeat(np.arange(count), np.diff(self.starts)), weights=np.maximum(self.excess, 0), minlength=count)
        return totals.astype(np.float64)


def graph(bags: Bags, ids: NDArray[np.int32], scores: NDArray[np.float32], labels: Ints) -> Graph:
    """ids, scores: [N, k], neighbours by falling score, -1 where missing. A score known in one direction only is computed in the other."""
    known = scores[ids >= 0]
    last = np.zeros(len(ids), dtype=np.float32)
    if ids.shape[1]:
        last[:] = np.where(ids[:, -1] >= 0, CLOSE * scores[:, -1], 0)
    starts, neighbours, excess = _graph(bags.offsets, bags.terms, bags.counts, bags.idf, bags.norms, ids, scores, last, labels)
    return Graph(starts, neighbours, excess, last, 2 * float(known.mean()) if len(known) else 0.0)


@_jit
def _graph(offsets, terms, counts, idf, norms, ids, scores, last, labels):  # type: ignore[no-untyped-def]
    count, k = ids.shape
    starts = np.zeros(count + 1, dtype=np.int64)
    mutual = np.full((count, k), -1, dtype=np.int16)  # the place of i in its neighbour's list; -2: must not share a group
    for i in range(count):
        for c in range(k):
            j = ids[i, c]
            if j < 0 or forbidden(i, j, labels):
                mutual[i, c] = -2
                continue
            for x in range(k):
                if ids[j, x] == i:
                    mutual[i, c] = x
                    break
            starts[i + 1] += 1
            if mutual[i, c] < 0:
                starts[j + 1] += 1
    for i in range(count):
        starts[i + 1] += starts[i]
    to = starts[:-1].copy()
    neighbours, excess = np.empty(starts[count], dtype=np.int32), np.empty(starts[count], dtype=np.float32)
    weights = np.zeros(len(idf), dtype=np.float32)
    for i in range(count):
        for at in range(offsets[i], offsets[i + 1]):
            tf = np.float32(counts[at])
            weights[terms[at]] = idf[terms[at]] * (tf / (tf + norms[i]))
        for c in range(k):
            j, back = ids[i, c], mutual[i, c]
            if back == -2:
                continue
            weight = scores[i, c] - last[i] - last[j]
            if back >= 0:
                weight += scores[j, back]
            else:
                for at in range(offsets[j], offsets[j + 1]):
                    weight += weights[terms[at]] * np.float32(counts[at])
                neighbours[to[j]], excess[to[j]] = i, weight
                to[j] += 1
            neighbours[to[i]], excess[to[i]] = j, weight
            to[i] += 1
        for at in range(offsets[i], offsets[i + 1]):
            weights[terms[at]] = 0
    return starts, neighbours, excess


def build(graph: Graph, members: Ints, size: int, labels: Ints) -> Ints:
    """Full groups of the members by repeated matching: int64 [len(members) / size, size].

    A group of m is two halves of m/2 rounded up and down, and so on: after d halvings its 2^d parts hold q = m // 2^d or q + 1. Going up,
    each kind of union (q with q, q with q + 1, both q + 1) has a number that makes the next sizes come out; none exceeds it.
    """
    groups = len(members) // size
    first = np.arange(len(members) + 1)  # where each part's members begin
    for depth in range((size - 1).bit_length(), 0, -1):
        small, above = size >> depth, size >> (depth - 1)
        parts = groups << depth
        larger = groups * size - parts * small
        smaller = parts - larger
        budget = np.array([(smaller - larger) // 2, larger, 0] if above == 2 * small else [0, smaller, (larger - smaller) // 2])
        if small == 0:
            budget[:2] = 0  # empty parts: their partners stay as they are
        part = np.full(len(labels), -1, dtype=np.int32)
        part[members] = np.repeat(np.arange(len(first) - 1), np.diff(first))
        a, b, weight = _unions(graph.starts, graph.neighbours, graph.excess, part, first, members)
        mate = np.full(len(first) - 1, -1, dtype=np.int64)
        _match(np.argsort(-weight, kind="stable"), a, b, first, members, small, above == 2 * small, budget, mate, labels)
        own = np.arange(len(mate))
        label = np.repeat(np.unique(np.where(mate >= 0, np.minimum(mate, own), own), return_inverse=True)[1], np.diff(first))
        members = members[np.argsort(label, kind="stable")]
        first = np.concatenate([[0], np.cumsum(np.bincount(label))])
    return members.reshape(groups, size)


@_jit
def _unions(starts, neighbours, excess, part, first, members):  # type: ignore[no-untyped-def]
    """Pairs of parts (a < b) with a positive sum of excess weights between them: int32 a, int32 b, float32 sum."""
    parts = len(first) - 1
    room = len(neighbours) // 2 + 1
    a, b, weight = np.empty(room, dtype=np.int32), np.empty(room, dtype=np.int32), np.empty(room, dtype=np.float32)
    sums, seen, touched = np.zeros(parts, dtype=np.float32), np.zeros(parts, dtype=np.bool_), np.empty(parts, dtype=np.int32)
    found = 0
    for here in range(parts):
        new = 0
        for i in members[first[here] : first[here + 1]]:
            for at in range(starts[i], starts[i + 1]):
                there = part[neighbours[at]]
                if there > here:
                    if not seen[there]:
                        seen[there], touched[new], sums[there] = True, there, 0
                        new += 1
                    sums[there] += excess[at]
        for there in touched[:new]:
            seen[there] = False
            if sums[there] > 0:
                a[found], b[found], weight[found] = here, there, sums[there]
                found += 1
    return a[:found], b[:found], weight[:found]


@_jit
def _match(order, a, b, first, members, small, all_larger, budget, mate, labels):  # type: ignore[no-untyped-def]
    """Greedy matching by falling weight within the budget of each kind of union; then what is left, in order."""
    for edge in order:
        x, y = a[edge], b[edge]
        if mate[x] >= 0 or mate[y] >= 0:
            continue
        kind = np.int64(first[x + 1] - first[x] > small) + np.int64(first[y + 1] - first[y] > small)
        if budget[kind] > 0 and not _parts_clash(x, y, first, members, labels):
            mate[x], mate[y] = y, x
            budget[kind] -= 1
    free = np.flatnonzero(mate < 0)
    is_large = np.diff(first)[free] > small
    large, little = free[is_large], free[~is_large]
    # Mixed unions first: of one size all parts need a partner of the other.
    if all_larger:
        _pair_up(large, little, budget[1], first, members, mate, labels)
    else:
        _pair_up(little, large, budget[1], first, members, mate, labels)
    _pair_up(little, little, budget[0], first, members, mate, labels)
    _pair_up(large, large, budget[2], first, members, mate, labels)


@_jit
def _parts_clash(x, y, first, members, labels):  # type: ignore[no-untyped-def]
    found = 0
    for i in members[first[x] : first[x + 1]]:
        found += clashes(i, members[first[y] : first[y + 1]], -1, labels)
    return found > 0


@_jit
def _pair_up(left, right, budget, first, members, mate, labels):  # type: ignore[no-untyped-def]
    begin = 0
    for x in left:
        if budget == 0:
            return
        if mate[x] >= 0:
            continue
        while begin < len(right) and mate[right[begin]] >= 0:
            begin += 1
        best, tries = -1, 0
        for place in range(begin, len(right)):
            y = right[place]
            if y == x or mate[y] >= 0:
                continue
            if best < 0:
                best = y
            if not _parts_clash(x, y, first, members, labels):
                best = y
                break
            tries += 1
            if tries == TRIES:
                break
        mate[x], mate[best] = best, x
        budget -= 1


def refine(bags: Bags, graph: Graph, groups: Ints, labels: Ints, passes: int) -> None:
    """Swaps between pairs of full groups, in place; a pair is tried again only when one of the two has changed."""
    if len(groups) < 2:
        return
    index = (bags.offsets, bags.terms, bags.counts, bags.idf, bags.norms)
    _refine(*index, graph.starts, graph.neighbours, graph.excess, graph.last, groups, labels, SLACK * graph.unit, LEAST * graph.unit, passes)


@_jit
def _refine(offsets, terms, counts, idf, norms, starts, neighbours, excess, last, groups, labels, slack, least, passes):  # type: ignore[no-untyped-def]
    total, size = groups.shape
    group_of, place_of = np.full(len(starts) - 1, -1, dtype=np.int64), np.empty(len(starts) - 1, dtype=np.int64)
    slots = np.zeros(len(idf), dtype=np.int32)
    table = np.zeros(((offsets[1:] - offsets[:-1]).max() * size + 1, 2, -(-size // LANES) * LANES), dtype=np.float32)
    within, across = np.zeros((total, size, size), dtype=np.float32), np.empty((size, size), dtype=np.float32)
    held = np.zeros(len(starts) - 1, dtype=np.float32)
    for g in range(total):
        _load(offsets, terms, counts, idf, norms, groups[g], slots, table)
        _exact(offsets, terms, counts, norms, groups[g], groups[g], slots, table, labels, within[g])
        _unload(offsets, terms, groups[g], slots)
        _enter(g, groups, within, last, group_of, place_of, held)
    room = min(total, size * (starts[1:] - starts[:-1]).max())
    number, touched = np.full(total, -1, dtype=np.int64), np.empty(total, dtype=np.int64)
    to_there, to_here = np.empty((room, size), dtype=np.float32), np.empty((room, size), dtype=np.float32)
    promise = np.empty(room, dtype=np.float32)
    both, side = np.zeros((2 * size, 2 * size), dtype=np.float64), np.empty(2 * size, dtype=np.int64)
    changed, tried, clock = np.zeros(total, dtype=np.int64), np.full(total, -1, dtype=np.int64), 0
    for _ in range(passes):
        improved = False
        for g in range(total):
            # What each member gains by a move to another group, and the other's members by a move here, as far as the graph knows.
            found = 0
            for place in range(size):
                i = groups[g, place]
                for at in range(starts[i], starts[i + 1]):
                    j = neighbours[at]
                    h = group_of[j]
                    if h < 0 or h == g or max(changed[g], changed[h]) <= max(tried[g], tried[h]):
                        continue
                    if number[h] < 0:
                        number[h], touched[found], to_there[found], to_here[found] = found, h, 0, 0
                        found += 1
                    to_there[number[h], place] += excess[at]
                    to_here[number[h], place_of[j]] += excess[at]
            for n in range(found):
                h = touched[n]
                number[h] = -1
                leaves, comes = np.float32(-np.inf), np.float32(-np.inf)
                for place in range(size):
                    leaves = max(leaves, to_there[n, place] - held[groups[g, place]])
                    comes = max(comes, to_here[n, place] - held[groups[h, place]])
                promise[n] = leaves + comes
            loaded = False
            for _ in range(min(PARTNERS, found)):
                best = np.argmax(promise[:found])
                if promise[best] <= 0:
                    break
                promise[best] = -np.inf
                h = touched[best]
                if not loaded:
                    _load(offsets, terms, counts, idf, norms, groups[g], slots, table)
                    loaded = True
                _exact(offsets, terms, counts, norms, groups[h], groups[g], slots, table, labels, across)
                if _best_swap(within[g], within[h], across) < -slack:
                    continue
                both[:size, :size], both[size:, size:], both[size:, :size], both[:size, size:] = within[g], within[h], across, across.T
                if not _swap(both, side, least):
                    continue
                _unload(offsets, terms, groups[g], slots)
                loaded, improved, clock = False, True, clock + 1
                members = np.concatenate((groups[g], groups[h]))
                for which, group in enumerate((g, h)):
                    stay = np.flatnonzero(side == which)
                    groups[group] = members[stay]
                    for place in range(size):
                        within[group, place] = both[stay[place]][stay]
                    _enter(group, groups, within, last, group_of, place_of, held)
                    changed[group] = clock
            if loaded:
                _unload(offsets, terms, groups[g], slots)
            tried[g] = clock
        if not improved:
            break


@_jit
def _enter(group, groups, within, last, group_of, place_of, held):  # type: ignore[no-untyped-def]
    """Note where a group's members are, and the excess weight that each has with the others."""
    members = groups[group]
    for place, i in enumerate(members):
        group_of[i], place_of[i], held[i] = group, place, 0
        for other, j in enumerate(members):
            if other != place:
                held[i] += within[group, place, other] - last[i] - last[j]


@_jit
def _load(offsets, terms, counts, idf, norms, members, slots, table):  # type: ignore[no-untyped-def]
    """A small dense table [slot, (as query, as document), place] of the group's terms; slots[term] is 0 where it has none of them."""
    used = 0
    for place, i in enumerate(members):
        for at in range(offsets[i], offsets[i + 1]):
            term, tf = terms[at], np.float32(counts[at])
            if slots[term] == 0:
                used += 1
                slots[term] = used
                table[used] = 0
            table[slots[term], 0, place] = tf * idf[term]
            table[slots[term], 1, place] = idf[term] * (tf / (tf + norms[i]))


@_jit
def _unload(offsets, terms, members, slots):  # type: ignore[no-untyped-def]
    for i in members:
        for at in range(offsets[i], offsets[i + 1]):
            slots[terms[at]] = 0


@_jit
def _exact(offsets, terms, counts, norms, members, loaded, slots, table, labels, weights):  # type: ignore[no-untyped-def]
    """weights[x, y] = w(members[x], loaded[y]), 0 with itself, -FORBIDDEN where the two must not share a group."""
    sums = np.empty(table.shape[2], dtype=np.float32)
    for x, i in enumerate(members):
        sums[:] = np.float32(0)
        norm = norms[i]
        for at in range(offsets[i], offsets[i + 1]):
            slot = slots[terms[at]]
            if slot:
                tf = np.float32(counts[at])
                saturated = tf / (tf + norm)
                for eight in range(0, len(sums), LANES):  # a constant length inside: twice as quick
                    for y in range(eight, eight + LANES):
                        sums[y] += saturated * table[slot, 0, y] + tf * table[slot, 1, y]
        for y, j in enumerate(loaded):
            weights[x, y] = 0 if i == j else -FORBIDDEN if forbidden(i, j, labels) else sums[y]


@_jit
def _best_swap(here, there, across):  # type: ignore[no-untyped-def]
    """Gain of the best exchange of one member each; across[x, y]: x of there, y of here."""
    size = len(across)
    leaves = np.zeros(size)
    for x in range(size):
        for y in range(size):
            leaves[y] += across[x, y] - here[x, y]
    best = -np.inf
    for x in range(size):
        comes = 0.0
        for y in range(size):
            comes += across[x, y] - there[x, y]
        for y in range(size):
            best = max(best, comes + leaves[y] - 2 * across[x, y])
    return best


@_jit
def _swap(weights, side, least):  # type: ignore[no-untyped-def]
    """Kernighan and Lin's series of swaps between two groups, members 0 to m-1 and m to 2m-1, as long as one gains. -> whether any did.

    weights: float64 [2m, 2m]; side: [2m], filled with the group, 0 or 1, of each.
    """
    count = len(weights)
    side[: count // 2], side[count // 2 :] = 0, 1
    gains, locked = np.empty(count), np.empty(count, dtype=np.bool_)
    left, right = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    improved = False
    while True:
        locked[:] = False
        for x in range(count):
            gains[x] = 0
            for y in range(count):
                gains[x] += weights[x, y] if side[y] != side[x] else -weights[x, y]
        total, best, length = 0.0, least, 0
        for step in range(max(count // 4, 1)):  # swapping more than half of the members is swapping the others
            highest, a, b = -np.inf, -1, -1
            for x in range(count):
                if locked[x] or side[x]:
                    continue
                for y in range(count):
                    if side[y] and not locked[y] and gains[x] + gains[y] - 2 * weights[x, y] > highest:
                        highest, a, b = gains[x] + gains[y] - 2 * weights[x, y], x, y
            total += highest
            left[step], right[step], locked[a], locked[b] = a, b, True, True
            if total > best:
                best, length = total, step + 1
            for x in range(count):
                change = 2 * (weights[x, a] - weights[x, b])
                gains[x] += -change if side[x] else change
        if length == 0:
            return improved
        improved = True
        for step in range(length):
            side[left[step]], side[right[step]] = 1, 0
