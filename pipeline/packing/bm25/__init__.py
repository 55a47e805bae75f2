"""Every segment's nearest neighbours by BM25, at corpus scale.

`bags`: segments as bags of terms, and the formula. `blocks`: their weights as small integers, quick to add up. `search`: the best k
among the segments that a query visits, exactly. `clusters`: which segments are worth a visit. Here: what a search is made of, and how it
is divided among ranks and resumed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.packing.bm25.bags import Bags, Rows
from pipeline.packing.bm25.blocks import LARGEST, Block, Quantiser
from pipeline.packing.bm25.clusters import Clusters
from pipeline.packing.bm25.search import Search, Visits

Mode: TypeAlias = Literal["exact", "pruned", "capped"]
Neighbours: TypeAlias = tuple[NDArray[np.int32], NDArray[np.float32]]

RECALL = 0.96
"""Share of the true neighbours of a sample that `pruned` is set to find, so that all together it finds 0.95 or more."""
SAMPLE = 512
CAP = 2**14
"""Segments that `capped` visits for each."""
PART = 2**14
"""Queries that are searched together, and kept in one file."""
GIB = 2**30


def neighbours(
    rows: Rows,
    k: int,
    *,
    k1: float = 0.9,
    b: float = 0.4,
    mode: Mode = "exact",
    max_frequency: float = 1.0,
    documents: NDArray[np.integer] | None = None,
    memory: float = 4.0,
    threads: int | None = None,
    directory: str | Path | None = None,
    ranks: Ranks | None = None,
) -> Neighbours:
    """The k segments that each segment, as a query, scores highest by BM25 (see `bags`): a self-join.

    rows: integers [N, L], or N arrays of integers. A number is a term; below 0, padding.
    mode: exact; pruned: visits only the nearest clusters of segments, as many as find 95 in 100 of the neighbours or more; capped: visits
        the nearest 16,384 segments only, so that the time grows little more than linearly. Up to 32,768 segments all three are exact.
    max_frequency: terms that a larger share of the segments have are ignored. Below 1 other neighbours are found.
    documents: [N], rising: the document of each segment. Segments of one document are then not neighbours of one another.
    memory: GiB that the search may hold besides `rows`; less memory costs time.
    threads: of this process, by default one a core it may use.
    directory: where finished parts are kept, so that the same call resumes; it must be one that all ranks see.
    ranks: which part of the queries is ours; every rank returns all the neighbours.

    -> ids int32 [N, k], by falling score, equal scores by rising id, the segment itself left out, -1 where fewer share a term with it;
    scores float32 [N, k], 0 where missing. The same for any number of threads and ranks and any memory.
    Raises UserError for rows that are no integers, a k below 1, an unknown mode, too little memory, or several ranks without a directory.
    """
    threads = threads or Ranks().threads
    bags = Bags.of(rows, k1=k1, b=b, max_frequency=max_frequency, threads=threads)
    return nearest(bags, k, mode=mode, documents=documents, memory=memory, threads=threads, directory=directory, ranks=ranks)


def nearest(
    bags: Bags,
    k: int,
    *,
    mode: Mode = "exact",
    documents: NDArray[np.integer] | None = None,
    memory: float = 4.0,
    threads: int = 1,
    directory: str | Path | None = None,
    ranks: Ranks | None = None,
) -> Neighbours:
    """`neighbours` of segments that are bags already."""
    ranks = ranks or Ranks()
    if k < 1:
        raise UserError(f"bm25: k is {k}, expected at least 1 neighbour")
    if mode not in get_args(Mode):
        raise UserError(f"bm25: mode {mode!r} is unknown; choose one of {', '.join(get_args(Mode))}")
    if ranks.size > 1 and directory is None:
        raise UserError(f"bm25: {ranks.size} ranks share the work through files; give a directory that all of them see")
    spans = _spans(len(bags), documents)
    parts = _Parts(bags, spans, k, mode, Path(directory) if directory else None)
    if todo := [part for part in range(ranks.rank, len(parts), ranks.size) if not parts.have(part)]:
        _search(bags, spans, k, mode, parts, todo, memory, threads)
    ranks.barrier()
    return parts.all()


def _spans(count: int, documents: NDArray[np.integer] | None) -> NDArray[np.int64]:
    """int64 [N, 2]: the segments [first, last) that a segment cannot have as neighbours."""
    if documents is None:
        return np.arange(count)[:, None] + np.arange(2)
    documents = np.asarray(documents)
    if len(documents) != count or (np.diff(documents) < 0).any():
        raise UserError(f"bm25: documents must be {count:,} rising numbers, one a segment, so that those of a document stand together")
    return np.stack([np.searchsorted(documents, documents, side=side) for side in ("left", "right")], axis=1).astype(np.int64)


def _search(bags: Bags, spans: NDArray[np.int64], k: int, mode: Mode, parts: _Parts, todo: list[int], memory: float, threads: int) -> None:
    """Searches the parts `todo`."""
    wanted = max(min(k, len(bags) - 1), 1)
    quantiser = Quantiser.of(bags)
    state = PART * Search.bytes_a_query(quantiser, wanted)
    room = int(memory * GIB) - bags.nbytes - parts.nbytes - state
    if room < 16 * 2**20:
        needed = (int(memory * GIB) - room + 64 * 2**20) / GIB
        raise UserError(f"bm25: {len(bags):,} segments need at least {needed:.2f} GiB, memory is {memory} GiB; raise memory")
    clusters = Clusters.of(bags, threads) if mode != "exact" and len(bags) > 2 * CAP else None  # of fewer, to see all is quicker
    members = clusters.members if clusters else [np.arange(first, min(first + LARGEST, len(bags))) for first in range(0, len(bags), LARGEST)]
    blocks = _Blocks(bags, quantiser, members, room - (3 * clusters.centres.nbytes if clusters else 0))
    segments = CAP
    if clusters and mode == "pruned":
        sample = np.linspace(0, len(bags) - 1, SAMPLE).astype(np.int64)
        segments = clusters.enough(bags, sample, _visit(Search(bags, quantiser, sample, spans, wanted), blocks, None, threads)[0], RECALL)
    together = 1 if blocks.kept else max(room // 4 // state, 1)
    for first in range(0, len(todo), together):
        passed = todo[first : first + together]
        queries = np.concatenate([parts.queries(part) for part in passed])
        visits = clusters.visits(bags, queries, segments, threads) if clusters else None
        ids, scores = _visit(Search(bags, quantiser, queries, spans, wanted), blocks, visits, threads)
        for part in passed:
            here = np.searchsorted(queries, parts.queries(part))
            parts.put(part, ids[here], scores[here])


def _visit(search: Search, blocks: _Blocks, visits: tuple[Visits, ...] | None, threads: int) -> Neighbours:
    for first, some in blocks.shards():
        for places, starts in visits or ():
            search.visit(some, (places, starts[first : first + len(some) + 1]), threads)
        if visits is None:
            search.visit(some, None, threads)
    return search.finish(threads)


class _Blocks:
    """The blocks, all at once where they fit into `room` bytes, else as many at a time as fit."""

    def __init__(self, bags: Bags, quantiser: Quantiser, members: list[NDArray[np.int64]], room: int):
        self._bags, self._quantiser, self._members, self._room = bags, quantiser, members, room
        self.kept: list[Block] = []
        for _, shard in self._make():
            if self.kept or len(shard) < len(members):
                self.kept = []
                break
            self.kept = shard

    def shards(self) -> Iterator[tuple[int, list[Block]]]:
        """(number of the first block, blocks)."""
        return iter([(0, self.kept)]) if self.kept else self._make()

    def _make(self) -> Iterator[tuple[int, list[Block]]]:
        shard: list[Block] = []
        used = first = 0
        for number, members in enumerate(self._members):
            block = Block.of(self._bags, self._quantiser, members)
            if shard and used + block.nbytes > self._room // 2:
                yield first, shard
                shard, used, first = [], 0, number
            shard.append(block)
            used += block.nbytes
        yield first, shard


@dataclass
class _Parts:
    """The neighbours found so far, in parts of PART queries: files of `directory`, named after what was searched, or memory."""

    bags: Bags
    spans: NDArray[np.int64]
    k: int
    mode: Mode
    directory: Path | None
    ids: NDArray[np.int32] = field(init=False)
    scores: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = np.full((len(self.bags), self.k), -1, dtype=np.int32)
        self.scores = np.zeros((len(self.bags), self.k), dtype=np.float32)
        if self.directory:
            self.directory.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(f"1 {self.k} {self.mode} {RECALL} {CAP}".encode())
            for array in (self.bags.offsets, self.bags.terms, self.bags.counts, self.bags.idf, self.bags.norms, self.spans):
                digest.update(array.data)
            self._name = f"neighbours-{digest.hexdigest()[:12]}"

    def __len__(self) -> int:
        return -(-len(self.bags) // PART)

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.scores.nbytes

    def queries(self, part: int) -> NDArray[np.int64]:
        return np.arange(part * PART, min((part + 1) * PART, len(self.bags)))

    def _file(self, part: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{self._name}-{part:05}.npz"

    def have(self, part: int) -> bool:
        return self.directory is not None and self._file(part).is_file()

    def put(self, part: int, ids: NDArray[np.int32], scores: NDArray[np.float32]) -> None:
        """Keep a part; a file is there whole or not at all."""
        here = self.queries(part)
        if self.directory is None:
            self.ids[here, : ids.shape[1]], self.scores[here, : ids.shape[1]] = ids, scores
            return
        unfinished = self._file(part).with_suffix(f".{os.getpid()}.partial")
        with unfinished.open("wb") as file:
            np.savez(file, ids=ids, scores=scores)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self._file(part))

    def all(self) -> Neighbours:
        for part in range(len(self)) if self.directory else ():
            with np.load(self._file(part), allow_pickle=False) as found:
                width = found["ids"].shape[1]
                self.ids[self.queries(part), :width], self.scores[self.queries(part), :width] = found["ids"], found["scores"]
        return self.ids, self.scores
