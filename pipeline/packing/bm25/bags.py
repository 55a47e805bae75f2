"""Segments as bags of terms, and Lucene's BM25 between two of them.

score(q, d) = sum over terms t of q and d: qtf(t) * idf(t) * tf(t) / (tf(t) + k1 * (1 - b + b * length(d) / mean length)),
idf(t) = ln(1 + (N - df(t) + 0.5) / (df(t) + 0.5)), with qtf and tf the term's counts in the query q and the document d
(Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework"; Lucene's BM25Similarity without the constant factor k1 + 1,
lengths kept exactly instead of in one byte).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError

Rows: TypeAlias = "NDArray[np.integer] | Sequence[NDArray[np.integer]]"
LARGEST_COUNT = 2**16 - 1
Result = TypeVar("Result")


@dataclass(frozen=True)
class Bags:
    """Every segment's distinct terms with their counts. Terms are numbered by falling document frequency, so low numbers are common words.

    offsets: int64 [N + 1] into terms and counts; terms: uint32 [nnz], rising within a segment; counts: uint16 [nnz];
    idf: float32 [V]; frequency: int64 [V], segments that have the term; norms: float32 [N], k1 * (1 - b + b * length / mean length).
    Terms that only one segment has are left out, for they match nothing; they count in the lengths.
    """

    offsets: NDArray[np.int64]
    terms: NDArray[np.uint32]
    counts: NDArray[np.uint16]
    idf: NDArray[np.float32]
    frequency: NDArray[np.int64]
    norms: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.norms)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.offsets, self.terms, self.counts, self.idf, self.frequency, self.norms))

    @classmethod
    def of(cls, rows: Rows, *, k1: float = 0.9, b: float = 0.4, max_frequency: float = 1.0, threads: int = 1) -> Bags:
        """rows: integers [N, L], or N arrays of integers; a negative number is padding, any other a term.

        max_frequency: terms in a larger share of the segments are left out of scores. That changes which neighbours are found.
        Raises UserError for rows that are no integers, or where one term stands more than 65,535 times.
        """
        return cls.of_flat(*_flat(rows), k1=k1, b=b, max_frequency=max_frequency, threads=threads)

    @classmethod
    def of_flat(
        cls, tokens: NDArray[np.int32], offsets: NDArray[np.int64], *, k1: float = 0.9, b: float = 0.4, max_frequency: float = 1.0, threads: int = 1
    ) -> Bags:
        """The same of rows end to end: tokens int32 [T], none negative; offsets int64 [N + 1]."""
        if len(tokens) and int(tokens.max()) > max(2 * len(tokens), 1 << 20):
            tokens = np.unique(tokens, return_inverse=True)[1].astype(np.int32)
        number, frequency = _numbers(tokens, offsets, max_frequency)
        lengths = np.diff(offsets)
        count = len(lengths)
        distinct = np.zeros(count + 1, dtype=np.int64)
        most = in_parts(lambda first, last: _count_distinct(tokens, offsets, number, distinct[1:], first, last), count, threads)
        if max(most, default=0) > LARGEST_COUNT:
            raise UserError(f"bm25: a row has one term {max(most):,} times, at most {LARGEST_COUNT:,} are counted; cut the rows shorter")
        np.cumsum(distinct, out=distinct)
        bag_terms, bag_counts = np.empty(distinct[-1], dtype=np.uint32), np.empty(distinct[-1], dtype=np.uint16)
        in_parts(lambda first, last: _fill(tokens, offsets, number, distinct, bag_terms, bag_counts, first, last), count, threads)
        idf = np.log1p((count - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
        mean = lengths.mean() if count and lengths.any() else 1.0
        norms = (k1 * (1 - b + b * lengths / mean)).astype(np.float32)
        return cls(distinct, bag_terms, bag_counts, idf, frequency, norms)

    def subset(self, segments: NDArray[np.int64]) -> Bags:
        """Those segments alone, numbered anew; the statistics stay those of all."""
        lengths = np.diff(self.offsets)[segments]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        kept = np.repeat(self.offsets[segments] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Bags(offsets, self.terms[kept], self.counts[kept], self.idf, self.frequency, self.norms[segments])

    def score(self, queries: NDArray[np.integer], documents: NDArray[np.integer], threads: int = 1) -> NDArray[np.float32]:
        """float32 [n, c]: BM25 of each query (a segment's number) [n] with its own documents [n, c]; 0 where a document is -1."""
        scores = np.zeros(documents.shape, dtype=np.float32)

        def part(first: int, last: int) -> None:
            table = np.zeros(len(self.idf), dtype=np.float32)
            _score_many(
                self.offsets, self.terms, self.counts, self.idf, self.norms, queries[first:last], documents[first:last], scores[first:last], table
            )

        in_parts(part, len(queries), threads)
        return scores


def in_parts(work: Callable[[int, int], Result], count: int, threads: int) -> list[Result]:
    """work(first, last) over [0, count) in a contiguous part for each thread. Not numba's own threads: they would change those of torch."""
    bounds = [count * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, bounds[:-1], bounds[1:]))


def _flat(rows: Rows) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """All rows end to end and where each begins, without padding, as int32."""
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        flat, lengths = np.ascontiguousarray(rows).reshape(-1), np.full(len(rows), rows.shape[1], dtype=np.int64)
    else:
        arrays = [np.asarray(row) for row in rows]
        lengths = np.array([array.size for array in arrays], dtype=np.int64)
        flat = np.concatenate([array.reshape(-1) for array in arrays if array.size] or [np.empty(0, dtype=np.int32)])
    if flat.dtype.kind not in "iu":
        raise UserError(f"bm25: rows hold {flat.dtype}, expected integers, a number for each term")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if len(flat) and flat.min() < 0:
        kept = flat >= 0
        offsets = np.concatenate([[0], np.cumsum(kept)])[offsets].astype(np.int64)
        flat = flat[kept]
    if len(flat) and int(flat.max()) >= 2**31 - 1:
        flat = np.unique(flat, return_inverse=True)[1]
    return flat.astype(np.int32, copy=False), offsets


def _numbers(tokens: NDArray[np.int32], offsets: NDArray[np.int64], max_frequency: float) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Terms numbered by falling document frequency, ties by their value.

    -> int32: the number of each value, -1 for one that is left out; int64 [V] document frequencies.
    """
    frequency = document_frequency(tokens, offsets, int(tokens.max(initial=-1)) + 1)
    kept = (frequency >= 2) & (frequency <= max_frequency * (len(offsets) - 1))
    order = np.argsort(-frequency, kind="stable")
    order = order[kept[order]]
    number = np.full(len(frequency), -1, dtype=np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    return number, frequency[order]


@numba.njit(cache=True, nogil=True)
def document_frequency(tokens, offsets, vocabulary):  # type: ignore[no-untyped-def]
    """int64 [vocabulary]: how many rows have each term; rows end to end, int64 [N + 1] offsets."""
    frequency, last = np.zeros(vocabulary, dtype=np.int64), np.full(vocabulary, -1, dtype=np.int64)
    for row in range(len(offsets) - 1):
        for token in tokens[offsets[row] : offsets[row + 1]]:
            if last[token] != row:
                last[token] = row
                frequency[token] += 1
    return frequency


@numba.njit(cache=True, nogil=True)
def _sorted(tokens, number, room):  # type: ignore[no-untyped-def]
    """The numbers of a row's terms, rising, without those left out: a part of `room`."""
    used = 0
    for token in tokens:
        if number[token] >= 0:
            room[used] = number[token]
            used += 1
    room[:used].sort()
    return room[:used]


@numba.njit(cache=True, nogil=True)
def _count_distinct(tokens, offsets, number, distinct, first, last):  # type: ignore[no-untyped-def]
    """Fills the number of distinct terms of rows [first, last); returns the largest count of one."""
    largest = 0
    room = np.empty((offsets[first + 1 : last + 1] - offsets[first:last]).max() if last > first else 0, dtype=np.int32)
    for row in range(first, last):
        run = 0
        terms = _sorted(tokens[offsets[row] : offsets[row + 1]], number, room)
        for at in range(len(terms)):
            if at == 0 or terms[at] != terms[at - 1]:
                distinct[row] += 1
                run = 0
            run += 1
            largest = max(largest, run)
    return largest


@numba.njit(cache=True, nogil=True)
def _fill(tokens, offsets, number, starts, terms, counts, first, last):  # type: ignore[no-untyped-def]
    room = np.empty((offsets[first + 1 : last + 1] - offsets[first:last]).max() if last > first else 0, dtype=np.int32)
    for row in range(first, last):
        to, previous = starts[row] - 1, -1
        for term in _sorted(tokens[offsets[row] : offsets[row + 1]], number, room):
            if term != previous:
                to += 1
                terms[to], counts[to] = term, 0
                previous = term
            counts[to] += 1


@numba.njit(cache=True, nogil=True)
def weigh(offsets, terms, counts, idf, query, weights):  # type: ignore[no-untyped-def]
    """weights[t] = qtf * idf of the query's terms; `weights` float32 [V] is zero elsewhere."""
    for at in range(offsets[query], offsets[query + 1]):
        weights[terms[at]] = counts[at] * idf[terms[at]]


@numba.njit(cache=True, nogil=True)
def unweigh(offsets, terms, query, weights):  # type: ignore[no-untyped-def]
    for at in range(offsets[query], offsets[query + 1]):
        weights[terms[at]] = 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def score_one(offsets, terms, counts, norms, document, weights):  # type: ignore[no-untyped-def]
    """BM25 of the weighed query with one document. Four sums in a fixed order: quick, and the same bits on every machine."""
    norm = norms[document]
    begin, end = offsets[document], offsets[document + 1]
    term, count = terms[begin:end], counts[begin:end]
    fours = len(term) // 4 * 4
    sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
    for at in range(0, fours, 4):
        tf_0, tf_1 = np.float32(count[at]), np.float32(count[at + 1])
        tf_2, tf_3 = np.float32(count[at + 2]), np.float32(count[at + 3])
        sum_0 += weights[term[at]] * (tf_0 / (tf_0 + norm))
        sum_1 += weights[term[at + 1]] * (tf_1 / (tf_1 + norm))
        sum_2 += weights[term[at + 2]] * (tf_2 / (tf_2 + norm))
        sum_3 += weights[term[at + 3]] * (tf_3 / (tf_3 + norm))
    for at in range(fours, len(term)):
        tf = np.float32(count[at])
        sum_0 += weights[term[at]] * (tf / (tf + norm))
    return (sum_0 + sum_1) + (sum_2 + sum_3)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _score_many(offsets, terms, counts, idf, norms, queries, documents, scores, table):  # type: ignore[no-untyped-def]
    for row in range(len(queries)):
        weigh(offsets, terms, counts, idf, queries[row], table)
        for column in range(documents.shape[1]):
            if documents[row, column] >= 0:
                scores[row, column] = score_one(offsets, terms, counts, norms, documents[row, column], table)
        unweigh(offsets, terms, queries[row], table)
