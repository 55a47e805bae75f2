"""Scores of queries and keys that lie on disk in fp16: of given candidates, and of every key."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import faiss
import numba
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.corpus.store import tokens_at
from pipeline.memory.shards import REMOVED, Shards

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

METRICS = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
NONE = np.float32(-np.inf)
"""The score of an entry that is not there."""
_QUERIES = 32
"""Queries that a thread scores at a time."""
_LIFT = np.float32(2.0**112)
"""What the exponents of fp32 and fp16 differ by."""


def scale(similarity: Floats, metric: str, dimensions: int) -> Floats:
    """Inner products, or squared distances, as scores: <q, k> / sqrt(d), or -|q - k|^2 / (2 sqrt(d))."""
    return similarity * np.float32(dimensions**-0.5 * (1.0 if metric == "ip" else -0.5))


def exact(queries: Floats, shards: Shards, k: int, metric: str) -> tuple[Floats, Ints]:
    """scores float32 [n, k], falling, and entries int64 [n, k] of every query's nearest keys: all are scored, a block at a time."""
    found = np.full((len(queries), k), NONE), np.full((len(queries), k), -1, dtype=np.int64)
    for entries, keys in shards.blocks():
        if not len(entries):
            continue
        similarity, place = faiss.knn(queries, keys, min(k, len(keys)), metric=METRICS[metric])
        both = np.concatenate([found[0], scale(similarity, metric, queries.shape[1])], axis=1), np.concatenate([found[1], entries[place]], axis=1)
        found = best(*both, k)
    return found


def rescored(queries: Floats, shards: Shards, entries: Ints, metric: str, threads: int) -> tuple[Floats, Ints]:
    """entries int64 [n, c], -1 where none -> their exact scores float32 [n, c], and values int64 [n, c]; -inf and -1 where none or removed."""
    keys = np.array([array.ctypes.data for array in shards.keys], dtype=np.int64)
    values = np.array([array.ctypes.data for array in shards.values], dtype=np.int64)
    scores, found = np.empty(entries.shape, dtype=np.float32), np.empty(entries.shape, dtype=np.int64)
    like = np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.int32)

    def part(first: int) -> None:
        rows = slice(first, first + _QUERIES)
        _rescore(queries[rows], entries[rows], keys, values, shards.starts, metric == "ip", *like, scores[rows], found[rows])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(0, len(queries), _QUERIES)))
    return np.where(found == REMOVED, NONE, scale(scores, metric, queries.shape[1])), found


def best(scores: Floats, other: Ints, k: int) -> tuple[Floats, Ints]:
    """The k highest scores [n, k] of each row, falling, and what belongs to them; filled with -inf and -1 where there are fewer."""
    top, place = torch.topk(torch.from_numpy(scores), min(k, scores.shape[1]), dim=1)
    chosen = np.take_along_axis(other, place.numpy(), axis=1)
    missing = ((0, 0), (0, k - chosen.shape[1]))
    return np.pad(top.numpy(), missing, constant_values=NONE), np.pad(chosen, missing, constant_values=-1)


@numba.njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _rescore(queries, entries, keys, values, starts, inner, like_key, like_value, scores, found):  # type: ignore[no-untyped-def]
    """Inner products, or squared distances, with keys taken from where they lie. An fp16's bits, shifted, are those of its fp32 over 2^112."""
    d = queries.shape[1]
    key = np.empty(d, dtype=np.uint32)
    wide = key.view(np.float32)
    for i in range(len(queries)):
        query = queries[i]
        for c in range(entries.shape[1]):
            entry = entries[i, c]
            scores[i, c], found[i, c] = 0.0, REMOVED
            if entry < 0:
                continue
            shard = 0
            while entry >= starts[shard + 1]:
                shard += 1
            at = entry - starts[shard]
            value = tokens_at(values[shard] + at * 4, 1, like_value)[0]
            if value == REMOVED:
                continue
            half = tokens_at(keys[shard] + at * d * 2, d, like_key)
            for j in range(d):
                bits = np.uint32(half[j])
                key[j] = ((bits & np.uint32(0x8000)) << np.uint32(16)) | ((bits & np.uint32(0x7FFF)) << np.uint32(13))
            total = np.float32(0.0)
            if inner:
                for j in range(d):
                    total += query[j] * (wide[j] * _LIFT)
            else:
                for j in range(d):
                    difference = query[j] - wide[j] * _LIFT
                    total += difference * difference
            scores[i, c], found[i, c] = total, value
