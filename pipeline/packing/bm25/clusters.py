"""Segments ordered by subject, so that a query need not visit them all: spherical k-means, and which clusters are near a query.

A segment's neighbours lie mostly in a few clusters: a third of 60,000 segments holds 96 in 100 of the 20 nearest. All sums are of
integers and the sample is fixed, so every rank finds the same clusters whatever its threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.packing.bm25.bags import Bags, in_parts
from pipeline.packing.bm25.blocks import LARGEST
from pipeline.packing.bm25.search import Visits

SIZE = 1024
"""Segments of a cluster on average."""
MOST = 1024
"""Clusters at most."""
SAMPLE = 32
"""Segments for each cluster that the k-means sees."""
COMMON = 0.2
"""Terms in a larger share of the segments say nothing of their subject."""
TERMS = 2**15
ROUNDS = 8
LENGTH = 512
"""Euclidean length of a segment's vector, in units."""
CENTRE = 2**14
"""The same of a cluster's."""


Pairs: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True)
class Clusters:
    """members: for each cluster its segments, rising. centres: int16 [terms, clusters], of terms first, first + 1, ...:
    the root of the mean square of the members' weights, which says more of the best among them than the mean does.
    """

    members: list[NDArray[np.int64]]
    first: int
    centres: NDArray[np.int16]

    @classmethod
    def of(cls, bags: Bags, threads: int) -> Clusters:
        count = len(bags)
        number = int(np.clip(count // SIZE, 1, MOST))
        first = int(np.searchsorted(-bags.frequency, -COMMON * count))
        terms = min(len(bags.idf) - first, TERMS)
        sample = np.linspace(0, count - 1, min(count, SAMPLE * number + 4096)).astype(np.int64)
        chosen = np.full(len(sample), -1, dtype=np.int64)
        chosen[np.linspace(0, len(sample) - 1, number).astype(np.int64)] = np.arange(number)
        for _ in range(ROUNDS):
            chosen = _nearest(bags, sample, _centres(bags, sample, chosen, number, first, terms, spread=False), first, threads)
        nearest = _nearest(bags, np.arange(count), _centres(bags, sample, chosen, number, first, terms, spread=False), first, threads)
        members = [part for cluster in range(number) for part in _parts(np.flatnonzero(nearest == cluster))]
        place = np.empty(count, dtype=np.int64)
        for cluster, segments in enumerate(members):
            place[segments] = cluster
        return cls(members, first, _centres(bags, np.arange(count), place, len(members), first, terms, spread=True))

    def visits(self, bags: Bags, queries: NDArray[np.int64], segments: int, threads: int) -> tuple[Visits, Visits]:
        """Each query visits the clusters nearest to it until they hold at least `segments`: first the nearest, then the others.

        After the first the best scores are known well enough to pass over most of what the others hold.
        """
        parts = in_parts(lambda first, last: self._visits(bags, queries[first:last], first, segments), len(queries), threads)
        return _by_cluster([near for near, _ in parts], len(self.members)), _by_cluster([others for _, others in parts], len(self.members))

    def _visits(self, bags: Bags, queries: NDArray[np.int64], first: int, segments: int) -> tuple[Pairs, Pairs]:
        """(query's place from `first` on, cluster) of the nearest cluster of each, and of the others to visit."""
        near: list[Pairs] = []
        others: list[Pairs] = []
        for begin in range(0, len(queries), 256):
            before = self._before(bags, queries[begin : begin + 256])
            for pairs, chosen in ((near, before == 0), (others, (before > 0) & (before < segments))):
                place, cluster = np.nonzero(chosen)
                pairs.append(np.stack([place + first + begin, cluster], axis=1).astype(np.int32))
        nothing = np.empty((0, 2), dtype=np.int32)
        return np.concatenate([nothing, *near]), np.concatenate([nothing, *others])

    def enough(self, bags: Bags, queries: NDArray[np.int64], neighbours: NDArray[np.int32], recall: float) -> int:
        """How many segments queries must visit to see that share of their true neighbours, int32 [n, k], -1 where missing."""
        place = np.empty(len(bags), dtype=np.int64)
        for cluster, segments in enumerate(self.members):
            place[segments] = cluster
        needed = np.take_along_axis(self._before(bags, queries), place[neighbours], axis=1)[neighbours >= 0]
        return int(np.quantile(needed, recall, method="higher")) + 1 if len(needed) else 1

    def _before(self, bags: Bags, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n, clusters]: the segments that a query sees in nearer clusters before it comes to each."""
        sizes = np.array([len(part) for part in self.members], dtype=np.int64)
        before = np.empty((len(queries), len(sizes)), dtype=np.int64)
        _segments_before(bags.offsets, bags.terms, bags.counts, bags.idf, bags.norms, queries, self.centres, self.first, sizes, before)
        return before


def _by_cluster(parts: list[Pairs], clusters: int) -> Visits:
    places, cluster = np.concatenate(parts).T
    order = np.argsort(cluster, kind="stable")  # within a cluster queries stay in order
    return np.ascontiguousarray(places[order]), np.searchsorted(cluster[order], np.arange(clusters + 1)).astype(np.int64)


def _parts(segments: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """A cluster in equal parts no larger than a block; none for an empty one."""
    return [part for part in np.array_split(segments, max(-(-len(segments) // LARGEST), 1)) if len(part)]


def _centres(
    bags: Bags, segments: NDArray[np.int64], cluster: NDArray[np.int64], number: int, first: int, terms: int, *, spread: bool
) -> NDArray[np.int16]:
    """int16 [terms, clusters]: the sum of the vectors of each cluster's segments at length CENTRE; `spread`: the root of their mean square."""
    sums = np.zeros((terms, number), dtype=np.int32)  # of squares: 4096 segments times 2^18 at most
    _sum_vectors(bags.offsets, bags.terms, bags.counts, bags.idf, bags.norms, segments, cluster, first, spread, sums)
    centres, sizes = np.empty((terms, number), dtype=np.int16), np.maximum(np.bincount(cluster[cluster >= 0], minlength=number), 1)
    for begin in range(0, number, 64):  # a few at a time: float64 takes four times the room
        here = sums[:, begin : begin + 64].astype(np.float64)
        if spread:
            here = np.sqrt(here / sizes[begin : begin + 64]) * (CENTRE / LENGTH)
        else:
            here *= CENTRE / np.maximum(np.sqrt((here**2).sum(0)), 1)
        centres[:, begin : begin + 64] = np.rint(here)
    return centres


def _nearest(bags: Bags, segments: NDArray[np.int64], centres: NDArray[np.int16], first: int, threads: int) -> NDArray[np.int64]:
    nearest = np.empty(len(segments), dtype=np.int64)

    def part(begin: int, end: int) -> None:
        _assign(bags.offsets, bags.terms, bags.counts, bags.idf, bags.norms, segments[begin:end], centres, first, nearest[begin:end])

    in_parts(part, len(segments), threads)
    return nearest


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _vector(offsets, terms, counts, idf, norms, segment, first, last, term, weight):  # type: ignore[no-untyped-def]
    """Fills term and weight with the segment's vector of BM25 weights, of length LENGTH; -> how many."""
    used = 0
    square = np.float64(0)
    norm = norms[segment]
    for at in range(offsets[segment], offsets[segment + 1]):
        number = np.int64(terms[at])
        if number >= first and number < last and used < len(term):
            tf = np.float32(counts[at])
            value = np.rint(idf[number] * (tf / (tf + norm)) * np.float32(LENGTH))
            term[used], weight[used] = number - first, np.int32(value)
            square += np.float64(value) * np.float64(value)
            used += 1
    scale = LENGTH / np.sqrt(max(square, 1.0))
    for i in range(used):
        weight[i] = np.int32(np.rint(weight[i] * scale))
    return used


@numba.njit(cache=True, nogil=True)
def _longest(offsets, segments):  # type: ignore[no-untyped-def]
    longest = 1
    for segment in segments:
        longest = max(longest, offsets[segment + 1] - offsets[segment])
    return longest


@numba.njit(cache=True, nogil=True)
def _sum_vectors(offsets, terms, counts, idf, norms, segments, cluster, first, squared, sums):  # type: ignore[no-untyped-def]
    term, weight = np.empty(_longest(offsets, segments), dtype=np.int64), np.empty(_longest(offsets, segments), dtype=np.int32)
    for i in range(len(segments)):
        if cluster[i] >= 0:
            used = _vector(offsets, terms, counts, idf, norms, segments[i], first, first + len(sums), term, weight)
            for at in range(used):
                sums[term[at], cluster[i]] += weight[at] * weight[at] if squared else weight[at]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _affinity(term, weight, used, centres, affinity):  # type: ignore[no-untyped-def]
    affinity[:] = 0
    for at in range(used):
        row, times = centres[term[at]], weight[at]
        for cluster in range(len(affinity)):
            affinity[cluster] += np.int32(row[cluster]) * times


@numba.njit(cache=True, nogil=True)
def _assign(offsets, terms, counts, idf, norms, segments, centres, first, nearest):  # type: ignore[no-untyped-def]
    term, weight = np.empty(_longest(offsets, segments), dtype=np.int64), np.empty(_longest(offsets, segments), dtype=np.int32)
    affinity = np.empty(centres.shape[1], dtype=np.int32)
    for i in range(len(segments)):
        used = _vector(offsets, terms, counts, idf, norms, segments[i], first, first + len(centres), term, weight)
        _affinity(term, weight, used, centres, affinity)
        nearest[i] = np.argmax(affinity)


@numba.njit(cache=True, nogil=True)
def _segments_before(offsets, terms, counts, idf, norms, queries, centres, first, sizes, before):  # type: ignore[no-untyped-def]
    term, weight = np.empty(_longest(offsets, queries), dtype=np.int64), np.empty(_longest(offsets, queries), dtype=np.int32)
    affinity = np.empty(centres.shape[1], dtype=np.int32)
    keys = np.empty(centres.shape[1], dtype=np.int64)
    for i in range(len(queries)):
        used = _vector(offsets, terms, counts, idf, norms, queries[i], first, first + len(centres), term, weight)
        _affinity(term, weight, used, centres, affinity)
        for cluster in range(len(keys)):
            keys[cluster] = np.int64(affinity[cluster]) * np.int64(65536) - cluster
        keys.sort()
        seen = np.int64(0)
        for at in range(len(keys) - 1, -1, -1):
            cluster = -keys[at] % np.int64(65536)
            before[i, cluster] = seen
            seen += sizes[cluster]
