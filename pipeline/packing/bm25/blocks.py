"""Segments in blocks, their BM25 weights as small integers, laid out so that a processor adds up many scores at once.

A score is a sum over terms. The few terms that very many segments have (the head) are summed by an 8-bit matrix product; the others
(the tail) by adding each posting to its segment's cell, which stays in the first-level cache because a block is small. Both are sums
of integers, so the same on every machine and in any order. An approximate score is at most its query's slack (`Quantiser.queries`) from the true one;
`search` scores again, exactly, whatever that leaves in question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.packing.bm25.bags import Bags

LARGEST = 4096
"""Segments of a block at most: 16 KiB of sums."""
GROUP = 64
"""Sums are searched in groups of so many: only a group whose largest sum can matter is looked at. Blocks are padded to whole groups."""
HEAD = 0.07
"""A term belongs to the head when a larger share of the segments have it: there the matrix product is quicker than the postings."""
HEAD_LIMIT = 512


@dataclass(frozen=True)
class Quantiser:
    """How weights become integers: `unit` is the score of 1; the head's terms are those numbered below `head`.

    factor: uint8 [head]. A head term's weight in a document is a multiple of factor * unit, and its weight in a query is
    count * factor, so that the product of two 8-bit numbers counts units.
    """

    head: int
    unit: float
    factor: NDArray[np.uint8]
    error: NDArray[np.float32]
    """float32 [V]: units by which one occurrence of a term in a query can make an approximate score wrong."""

    @property
    def width(self) -> int:
        """Columns of the head's matrices: whole cache lines, which the matrix product needs to be quick."""
        return max(-(-self.head // 64), 1) * 64

    @classmethod
    def of(cls, bags: Bags) -> Quantiser:
        head = min(int(np.searchsorted(-bags.frequency, -HEAD * len(bags), side="right")), HEAD_LIMIT)
        # Finer units leave less to score again, but let fewer repetitions of a term fit 8 bits in a query.
        levels = int(np.clip(2048 * len(bags) / max(bags.counts.sum(dtype=np.int64), 1), 1, 8))
        highest = _highest(bags.offsets, bags.terms, bags.counts, bags.idf)
        unit = max(float(bags.idf[:head].max(initial=0.0)) / (127 * levels), float(bags.idf.max(initial=1.0)) / 2**14, highest / 2**29)
        factor = np.ceil(bags.idf[:head] / np.float32(127 * unit)).clip(1).astype(np.uint8)
        step = np.ones(len(bags.idf), dtype=np.float32)
        step[:head] = factor
        # A weight is rounded to the nearest step, but never to 0: a sum is 0 only where no term is shared.
        smallest = bags.idf / (1 + bags.norms.max(initial=1.0)) / np.float32(unit)
        error = np.where(smallest < step / 2, step, step / 2) * np.float32(1.001)
        return cls(head, unit, factor, error)

    def queries(self, bags: Bags, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.int64], NDArray[np.int32]]:
        """For segments as queries: int8 [n, width], int64 [n] where each one's tail begins in `bags.terms`, int32 [n] slack in units."""
        weights = np.zeros((len(numbers), self.width), dtype=np.int8)
        tails, slack = np.empty(len(numbers), dtype=np.int64), np.empty(len(numbers), dtype=np.int32)
        _weigh_queries(bags.offsets, bags.terms, bags.counts, numbers, self.head, self.factor, self.error, weights, tails, slack)
        return weights, tails, slack


@dataclass(frozen=True)
class Block:
    """Segments `members` [n], rising. head: int8 [padded n, width]. A posting is weight << 16 | place in the block, under its term.

    bits: uint64 [words], which of the tail's terms occur; rank: int32 [words], terms before each word; starts: int64 [terms + 1].
    """

    members: NDArray[np.int64]
    head: NDArray[np.int8]
    bits: NDArray[np.uint64]
    rank: NDArray[np.int32]
    starts: NDArray[np.int32]
    postings: NDArray[np.uint32]

    @classmethod
    def of(cls, bags: Bags, quantiser: Quantiser, members: NDArray[np.int64]) -> Block:
        padded = -(-len(members) // GROUP) * GROUP
        head = np.zeros((padded, quantiser.width), dtype=np.int8)
        words = (len(bags.idf) - quantiser.head + 63) // 64
        room = int((bags.offsets[members + 1] - bags.offsets[members]).sum())
        bits, rank = np.zeros(words, dtype=np.uint64), np.zeros(words + 1, dtype=np.int32)
        entries, postings = np.empty(room, dtype=np.uint64), np.empty(room, dtype=np.uint32)
        used = _enter(
            bags.offsets,
            bags.terms,
            bags.counts,
            bags.norms,
            bags.idf,
            members,
            quantiser.head,
            quantiser.unit,
            quantiser.factor,
            head,
            bits,
            entries,
        )
        terms = _rank(bits, rank)
        starts = np.zeros(terms + 1, dtype=np.int32)
        _post(entries[:used], bits, rank, starts, postings)
        return cls(members, head, bits, rank, starts, postings[:used].copy())

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.members, self.head, self.bits, self.rank, self.starts, self.postings))


@numba.njit(cache=True, nogil=True)
def _highest(offsets, terms, counts, idf):  # type: ignore[no-untyped-def]
    """More than any score: a query's weights, were each document's 1."""
    highest = 0.0
    for segment in range(len(offsets) - 1):
        total = 0.0
        for at in range(offsets[segment], offsets[segment + 1]):
            total += counts[at] * idf[terms[at]]
        highest = max(highest, total)
    return highest


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _weigh_queries(offsets, terms, counts, numbers, head, factor, error, weights, tails, slack):  # type: ignore[no-untyped-def]
    for i in range(len(numbers)):
        begin, end = offsets[numbers[i]], offsets[numbers[i] + 1]
        wrong = 2.0
        at = begin
        while at < end and terms[at] < head:
            term = terms[at]
            weight = np.int64(counts[at]) * factor[term]
            weights[i, term] = min(weight, 127)
            wrong += counts[at] * error[term] + max(weight - 127, 0) * 127.0
            at += 1
        tails[i] = at
        while at < end:
            wrong += counts[at] * error[terms[at]]
            at += 1
        slack[i] = np.int32(min(np.ceil(wrong), 1e9))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _enter(offsets, terms, counts, norms, idf, members, head_size, unit, factor, head, bits, entries):  # type: ignore[no-untyped-def]
    """Fills the head and the bits, and lists the tail's postings as (term << 32 | weight << 16 | place)."""
    used = 0
    for place in range(len(members)):
        segment = members[place]
        norm = norms[segment]
        for at in range(offsets[segment], offsets[segment + 1]):
            term = terms[at]
            tf = np.float32(counts[at])
            weight = idf[term] * (tf / (tf + norm)) / np.float32(unit)
            if term < head_size:
                head[place, term] = np.int8(max(np.rint(weight / factor[term]), np.float32(1)))
            else:
                tail = np.uint64(term) - np.uint64(head_size)
                bits[tail >> np.uint64(6)] |= np.uint64(1) << (tail & np.uint64(63))
                whole = np.uint64(max(np.rint(weight), np.float32(1)))
                entries[used] = tail << np.uint64(32) | whole << np.uint64(16) | np.uint64(place)
                used += 1
    return used


@numba.njit(inline="always")
def ones(word):  # type: ignore[no-untyped-def]
    """Bits set in a uint64; compiled to one instruction."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@numba.njit(inline="always")
def place_of(bits, rank, tail):  # type: ignore[no-untyped-def]
    """Number among the block's own terms of a tail term that it has."""
    word = tail >> np.uint64(6)
    below = bits[word] & ((np.uint64(1) << (tail & np.uint64(63))) - np.uint64(1))
    return rank[word] + np.int64(ones(below))


@numba.njit(cache=True, nogil=True)
def _rank(bits, rank):  # type: ignore[no-untyped-def]
    for word in range(len(bits)):
        rank[word + 1] = rank[word] + np.int32(ones(bits[word]))
    return rank[len(bits)]


@numba.njit(cache=True, nogil=True)
def _post(entries, bits, rank, starts, postings):  # type: ignore[no-untyped-def]
    """Counting sort of the entries by term; places stay in order."""
    for at in range(len(entries)):
        starts[place_of(bits, rank, entries[at] >> np.uint64(32)) + 1] += 1
    for term in range(len(starts) - 1):
        starts[term + 1] += starts[term]
    free = starts.copy()
    for at in range(len(entries)):
        term = place_of(bits, rank, entries[at] >> np.uint64(32))
        postings[free[term]] = np.uint32(entries[at] & np.uint64(0xFFFFFFFF))
        free[term] += 1
