"""Groups of segments that retrieve one another: terms, near-duplicates, BM25 neighbours, groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.launch.ranks import Ranks
from pipeline.packing import groups as grouping
from pipeline.packing import near_duplicates, terms
from pipeline.packing.barriers import conflicts
from pipeline.packing.bm25 import nearest
from pipeline.packing.bm25.bags import Bags
from pipeline.packing.segments import Ints, Segments
from pipeline.packing.settings import BM25Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.corpus.store import Store


@dataclass(frozen=True)
class Related:
    """groups: int64 [G, size]; removed: bool [N], near-duplicates that are in no group; found: what to say of it in plan.json."""

    groups: Ints
    removed: NDArray[np.bool_]
    found: dict[str, Any]


def related(
    cut: Segments, store: Store, tokenizer: PreTrainedTokenizerFast, size: int, settings: BM25Settings, seed: int, ranks: Ranks, scratch: Path
) -> Related:
    """Groups of `size` from all ranks' work; on ranks but the first there are none.

    scratch: where finished parts of the search are kept for a later attempt; all ranks must see it.
    """
    threads = settings.threads or ranks.threads
    rows = terms.rows(cut.pieces, cut.offsets, store, tokenizer, settings.terms)
    bags = Bags.of_flat(*rows, k1=settings.k1, b=settings.b, max_frequency=settings.max_frequency, threads=threads)
    apart = None if settings.same_document else cut.documents
    ids, scores = nearest(
        bags, settings.neighbours, mode=settings.search, documents=apart, memory=settings.memory, threads=threads, directory=scratch, ranks=ranks
    )
    count = len(bags)
    if not ranks.first:
        return Related(np.empty((0, size), dtype=np.int64), np.zeros(count, dtype=np.bool_), {})
    pairs, copies = near_duplicates.pairs(bags, ids, settings.duplicate_overlap), near_duplicates.exact(bags)
    surplus = near_duplicates.removed(count, pairs, copies)
    removed = surplus if settings.near_duplicates == "remove" else np.zeros(count, dtype=np.bool_)
    near = np.concatenate([pairs, copies]) if settings.near_duplicates == "apart" else None
    kept = np.flatnonzero(~removed)
    number = np.full(count + 1, -1, dtype=np.int64)  # -1 stays -1
    number[kept] = np.arange(len(kept))
    documents = None if apart is None else apart[kept]
    near = None if near is None else number[near]
    ids, scores = _without_gaps(number[ids[kept]], scores[kept])
    if settings.policy == "chain":
        groups = grouping.chain(ids, size, seed, documents=documents, apart=near)
    else:
        groups = grouping.matching(bags.subset(kept), ids, scores, size, documents=documents, apart=near)
    found = {"found": int(surplus.sum()), "removed": int(removed.sum())}
    return Related(np.where(groups < 0, -1, kept[groups]), removed, {"duplicates": found, "met_but_should_not": conflicts(groups, documents, near)})


def _without_gaps(ids: Ints, scores: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Neighbours that were removed (-1) move to the end of each list."""
    order = np.argsort(ids < 0, axis=1, kind="stable")
    ids, scores = np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
    return ids.astype(np.int32), np.where(ids < 0, np.float32(0), scores)
