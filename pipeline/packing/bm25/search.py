"""The k segments with the highest BM25 among those of the blocks that each query visits: exact, whatever the order of the visits.

Approximate scores (see `blocks`) decide which segments can be among the k; those are scored again with `bags.score_one`.
"""

from __future__ import annotations

from typing import TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.packing.bm25.bags import Bags, in_parts, score_one, unweigh, weigh
from pipeline.packing.bm25.blocks import GROUP, Block, Quantiser, place_of
from pipeline.packing.bm25.prefetch import prefetch

Visits: TypeAlias = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Which queries visit each block: their places, and int64 [blocks + 1] where a block's begin."""

CELLS = 2**20
"""Sums held at a time by a thread: 4 MiB. More queries at a time read a block less often, but no longer fit the cache."""
LINE = 16
"""Postings of a cache line."""


class Search:
    """The best k so far of each of `queries` (segments' numbers, [n]).

    spans: int64 [N, 2], the segments [first, last) that are not among a segment's neighbours: itself, and others of its document.
    ids: int32 [n, k], by falling score, equal scores by rising id, -1 where there are fewer; scores: float32 [n, k].
    """

    def __init__(self, bags: Bags, quantiser: Quantiser, queries: NDArray[np.int64], spans: NDArray[np.int64], k: int):
        self.bags, self.quantiser, self.queries, self.spans = bags, quantiser, queries, spans[queries]
        self.weights, self.tails, self.slack = quantiser.queries(bags, queries)
        self.ids = np.full((len(queries), k), -1, dtype=np.int32)
        self.scores = np.zeros((len(queries), k), dtype=np.float32)
        self._waiting = np.empty((len(queries), max(128, 3 * k)), dtype=np.int64)
        self._count = np.zeros(len(queries), dtype=np.int32)
        self._floor = np.ones(len(queries), dtype=np.int32)

    @staticmethod
    def bytes_a_query(quantiser: Quantiser, k: int) -> int:
        return quantiser.width + 8 * k + 8 * max(128, 3 * k) + 20

    def visit(self, blocks: list[Block], visits: Visits | None, threads: int) -> None:
        """Let each query see its blocks (all of them without `visits`). Each thread has queries of its own."""
        import torch

        before = torch.get_num_threads()
        in_parts(lambda first, last: self._part(blocks, visits, first, last), len(self.queries), threads)
        torch.set_num_threads(before)

    def _part(self, blocks: list[Block], visits: Visits | None, first: int, last: int) -> None:
        import torch

        torch.set_num_threads(1)  # this thread's products: the threads here are ours
        table, room = np.zeros(len(self.bags.idf), dtype=np.float32), np.empty(CELLS, dtype=np.int32)
        everyone = np.arange(first, last, dtype=np.int32)
        if visits is None:  # a batch of queries stays in the cache while the blocks go by, from its own on: there the best neighbours often are
            begins = np.array([block.members[0] for block in blocks])
            step = max(CELLS // max(len(block.head) for block in blocks), 1)
            for begin in range(0, len(everyone), step):
                batch = everyone[begin : begin + step]
                own = max(int(np.searchsorted(begins, self.queries[batch[0]], side="right")) - 1, 0)
                for block in blocks[own:] + blocks[:own]:
                    self._batch(block, batch, table, room)
            return
        places, starts = visits
        for number, block in enumerate(blocks):
            here = places[starts[number] : starts[number + 1]]
            here = here[np.searchsorted(here, first) : np.searchsorted(here, last)]
            step = max(CELLS // len(block.head), 1)
            for begin in range(0, len(here), step):
                self._batch(block, here[begin : begin + step], table, room)

    def _batch(self, block: Block, places: NDArray[np.int32], table: NDArray[np.float32], room: NDArray[np.int32]) -> None:
        bags = self.bags
        sums = room[: len(places) * len(block.head)].reshape(len(places), -1)
        product(self.weights[places], block.head, sums)
        _visit(
            sums, block.members, block.bits, block.rank, block.starts, block.postings,
            places, self.queries, self.spans, self.tails, self.quantiser.head,
            bags.offsets, bags.terms, bags.counts, bags.idf, bags.norms, np.float32(self.quantiser.unit),
            self.slack, self._waiting, self._count, self._floor, self.ids, self.scores, table,
        )  # fmt: skip

    def finish(self, threads: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Settles what waits; -> ids, scores."""
        bags = self.bags

        def part(first: int, last: int) -> None:
            _finish(
                first, last, self.queries, bags.offsets, bags.terms, bags.counts, bags.idf, bags.norms, np.float32(self.quantiser.unit),
                self.slack, self._waiting, self._count, self._floor, self.ids, self.scores, np.zeros(len(bags.idf), dtype=np.float32),
            )  # fmt: skip

        in_parts(part, len(self.queries), threads)
        return self.ids, self.scores


def product(queries: NDArray[np.int8], head: NDArray[np.int8], out: NDArray[np.int32]) -> None:
    """out [n, segments]: int8 [n, H] times int8 [segments, H] transposed, exactly."""
    import torch

    left, right = torch.from_numpy(queries), torch.from_numpy(head).T
    if torch.backends.mkldnn.is_available():
        torch._int_mm(left, right, out=torch.from_numpy(out))
    else:  # no 8-bit product worth its name; in float32 these sums, below 2^24, are exact too
        out[:] = (left.float() @ right.float()).numpy()


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _visit(  # type: ignore[no-untyped-def]
    sums, members, bits, rank, starts, postings, places, queries, spans, tails, head,
    offsets, terms, counts, idf, norms, unit, slack, waiting, count, floor, ids, scores, table,
):  # fmt: skip
    """Adds the tail to `sums` [n, padded block] and keeps what may be among the k best of each query."""
    room = waiting.shape[1]
    longest = 0
    for place in places:
        longest = max(longest, offsets[queries[place] + 1] - tails[place])
    begins, ends, times = np.empty(longest, dtype=np.int32), np.empty(longest, dtype=np.int32), np.empty(longest, dtype=np.uint32)
    for row in range(len(places)):
        place = places[row]
        query = queries[place]
        cells = sums[row]
        first, last = tails[place], offsets[query + 1]
        _add_tail(cells, bits, rank, starts, postings, terms[first:last], counts[first:last], head, begins, ends, times)
        if spans[place, 0] <= members[-1] and spans[place, 1] > members[0]:
            cells[np.searchsorted(members, spans[place, 0]) : np.searchsorted(members, spans[place, 1])] = 0
        if floor[place] == 1:
            floor[place] = max(np.int32(1), _kth_group(cells, ids.shape[1]) - 2 * slack[place])
        for begin in range(0, len(cells), GROUP):
            group = cells[begin : begin + GROUP]
            if _largest(group) < floor[place]:
                continue
            for cell in range(len(group)):
                if group[cell] >= floor[place]:
                    waiting[place, count[place]] = (np.int64(group[cell]) << np.int64(32)) | (np.int64(2**31) - members[begin + cell])
                    count[place] += 1
                    if count[place] == room:
                        _make_room(place, query, offsets, terms, counts, idf, norms, unit, slack, waiting, count, floor, ids, scores, table)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _add_tail(cells, bits, rank, starts, postings, terms, counts, head, begins, ends, times):  # type: ignore[no-untyped-def]
    """All runs of postings are looked up before the first is added, so that they are on their way from memory together."""
    runs = 0
    for at in range(len(terms)):
        tail = np.uint64(terms[at]) - np.uint64(head)
        if (bits[tail >> np.uint64(6)] >> (tail & np.uint64(63))) & np.uint64(1):
            place = place_of(bits, rank, tail)
            begins[runs], ends[runs], times[runs] = starts[place], starts[place + 1], counts[at]
            prefetch(postings, np.intp(starts[place]))
            prefetch(postings, np.intp(starts[place]) + LINE)
            runs += 1
    for number in range(runs):
        run, count = postings[begins[number] : ends[number]], times[number]
        for i in range(len(run)):
            cells[run[i] & np.uint32(0xFFFF)] += (run[i] >> np.uint32(16)) * count


@numba.njit(cache=True, nogil=True)
def _largest(group):  # type: ignore[no-untyped-def]
    largest = np.int32(0)
    for cell in range(len(group)):
        largest = max(largest, group[cell])
    return largest


@numba.njit(cache=True, nogil=True)
def _kth_group(cells, k):  # type: ignore[no-untyped-def]
    """A sum that at least k cells reach: the k-th largest of the groups' largest. 0 where there are fewer groups."""
    size = GROUP
    while size > 8 and len(cells) // size < 3 * k:
        size //= 2
    groups = len(cells) // size
    if groups < k:
        return np.int32(0)
    largest = np.zeros(groups, dtype=np.int32)
    for number in range(groups):
        largest[number] = _largest(cells[number * size : (number + 1) * size])
    largest.sort()
    return largest[groups - k]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _make_room(place, query, offsets, terms, counts, idf, norms, unit, slack, waiting, count, floor, ids, scores, table):  # type: ignore[no-untyped-def]
    """Drops what can no longer be among the k best; where that is not enough, settles."""
    k = ids.shape[1]
    mine = waiting[place, : count[place]]
    mine.sort()
    floor[place] = max(floor[place], np.int32(mine[len(mine) - k] >> np.int64(32)) - 2 * slack[place])
    least = np.int64(floor[place]) << np.int64(32)
    keep = len(mine) - np.searchsorted(mine, least)
    if keep > waiting.shape[1] * 3 // 4:
        _settle(place, query, offsets, terms, counts, idf, norms, unit, slack, waiting, count, floor, ids, scores, table)
    else:
        waiting[place, :keep] = mine[len(mine) - keep :].copy()
        count[place] = keep


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _settle(place, query, offsets, terms, counts, idf, norms, unit, slack, waiting, count, floor, ids, scores, table):  # type: ignore[no-untyped-def]
    """Scores exactly all that waits and can matter, the most promising first, and raises the floor to the k-th best."""
    k = ids.shape[1]
    mine = waiting[place, : count[place]]
    mine.sort()
    weigh(offsets, terms, counts, idf, query, table)
    for at in range(len(mine) - 1, -1, -1):
        if np.int32(mine[at] >> np.int64(32)) < floor[place]:
            break
        found = np.int32(np.int64(2**31) - (mine[at] & np.int64(0xFFFFFFFF)))
        score = score_one(offsets, terms, counts, norms, found, table)
        if ids[place, k - 1] >= 0 and (score < scores[place, k - 1] or (score == scores[place, k - 1] and found > ids[place, k - 1])):
            continue
        if score <= 0:
            continue
        slot = k - 1
        while slot > 0 and (
            ids[place, slot - 1] < 0 or score > scores[place, slot - 1] or (score == scores[place, slot - 1] and found < ids[place, slot - 1])
        ):
            ids[place, slot], scores[place, slot] = ids[place, slot - 1], scores[place, slot - 1]
            slot -= 1
        ids[place, slot], scores[place, slot] = found, score
        if ids[place, k - 1] >= 0:
            floor[place] = max(floor[place], np.int32(scores[place, k - 1] / unit) - slack[place])
    unweigh(offsets, terms, query, table)
    count[place] = 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _finish(first, last, queries, offsets, terms, counts, idf, norms, unit, slack, waiting, count, floor, ids, scores, table):  # type: ignore[no-untyped-def]
    for place in range(first, last):
        _settle(place, queries[place], offsets, terms, counts, idf, norms, unit, slack, waiting, count, floor, ids, scores, table)
