"""Inverted lists of product-quantised keys (Jegou et al. 2011), by faiss; before them, where asked, principal components.

One trained quantiser makes a part of every shard; the parts are merged when the datastore is opened, and 4-bit codes laid out for
SIMD look-ups (Andre et al. 2015).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.errors import UserError
from pipeline.memory.settings import IndexSettings

Floats = NDArray[np.float32]

METRICS = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}
SAMPLE = 64
"""Keys that it is trained on for each list, or each value of a code where those are more; faiss asks for 39."""
PARTS = 64
"""Sub-quantisers at most, unless the recipe names more."""


@dataclass(frozen=True)
class Projection:
    """Principal components of the keys: components float32 [r, d], orthonormal rows; mean float32 [d]; spread: mean square of what is left out.

    Differences, and so Euclidean distances, need no centring, nor do inner products with a query: what the components leave out of a
    key is nearly the mean's own, `rest`, which `offset` gives back.
    """

    components: Floats
    mean: Floats
    spread: float

    @classmethod
    def of(cls, keys: Floats, dimensions: int) -> Projection:
        mean = keys.mean(axis=0)
        values, vectors = np.linalg.eigh(np.cov(keys, rowvar=False).astype(np.float64))
        components = np.ascontiguousarray(vectors[:, ::-1][:, :dimensions].T, dtype=np.float32)
        return cls(components, mean, float(values[:-dimensions].sum()))

    def __call__(self, vectors: Floats) -> Floats:
        """[n, d] -> [n, r]."""
        return np.ascontiguousarray(vectors @ self.components.T)

    def offset(self, queries: Floats, metric: str) -> Floats:
        """float32 [n, 1]: what is missing on average from a query's inner product, or squared distance, among the components."""
        if metric == "ip":
            return queries @ self._rest(self.mean[None]).T
        return (np.square(self._rest(queries - self.mean)).sum(axis=1, keepdims=True) + np.float32(self.spread)).astype(np.float32)

    def _rest(self, vectors: Floats) -> Floats:
        return vectors - (vectors @ self.components.T) @ self.components

    def save(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, components=self.components, mean=self.mean, spread=np.float64(self.spread))
        _place(temporary, path)

    @classmethod
    def open(cls, path: Path) -> Projection:
        with np.load(path, allow_pickle=False) as found:
            return cls(found["components"], found["mean"], float(found["spread"]))


def lists_for(entries: int) -> int:
    """About 4 sqrt(entries), a power of 2, from 16 to 65,536."""
    return int(2 ** np.clip(np.round(np.log2(4 * np.sqrt(max(entries, 1)))), 4, 16))


def bits_of(settings: IndexSettings) -> int:
    return settings.bits or (4 if settings.keep_keys else 8)


def sample(settings: IndexSettings, entries: int, seed: int) -> NDArray[np.int64]:
    """int64, rising: the entries that the quantiser is trained on."""
    count = SAMPLE * max(settings.lists or lists_for(entries), 1 << bits_of(settings))
    return np.sort(np.random.default_rng(seed).choice(entries, min(count, entries), replace=False)).astype(np.int64)


def train(directory: Path, keys: Floats, entries: int, settings: IndexSettings, seed: int) -> None:
    """Write `quantiser.faiss`, and `projection.npz` where keys are reduced. keys: float32 [n, d], a sample of the `entries`.

    Raises UserError when the settings do not suit the keys.
    """
    dimensions = keys.shape[1]
    if settings.reduce is not None:
        if settings.reduce > dimensions:
            raise UserError(f"index.reduce {settings.reduce} exceeds the {dimensions} dimensions of a key; lower it, or leave it out")
        projection = Projection.of(keys, settings.reduce)
        projection.save(directory / "projection.npz")
        keys, dimensions = projection(keys), settings.reduce
    bits = bits_of(settings)
    lists = min(settings.lists or lists_for(entries), len(keys))
    if len(keys) < 1 << bits:
        raise UserError(f"index.kind: {len(keys)} keys are too few to train codes of {bits} bits; set index.kind=flat")
    parts = _subquantizers(settings, dimensions)
    coarse = faiss.IndexFlat(dimensions, METRICS[settings.metric])
    index = faiss.IndexIVFPQ(coarse, dimensions, lists, parts, bits, METRICS[settings.metric])
    index.cp.seed = index.pq.cp.seed = seed % (1 << 31)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # the sample is what there is
    index.train(keys)
    _write(index, directory / "quantiser.faiss")


def _subquantizers(settings: IndexSettings, dimensions: int) -> int:
    if settings.subquantizers is None:
        return max(parts for parts in range(1, PARTS + 1) if dimensions % parts == 0 and (parts == 1 or dimensions // parts >= 2))
    if dimensions % settings.subquantizers:
        raise UserError(f"index.subquantizers {settings.subquantizers} is not a divisor of the {dimensions} dimensions that are searched")
    return settings.subquantizers


def trained(directory: Path) -> tuple[Any, Projection | None]:
    """The empty index and the projection, as `train` wrote them."""
    projection = directory / "projection.npz"
    return faiss.read_index(str(directory / "quantiser.faiss")), Projection.open(projection) if projection.is_file() else None


def write_part(path: Path, directory: Path, blocks: Iterable[tuple[NDArray[np.int64], Floats]]) -> None:
    """The inverted lists of some entries, made with the quantiser of `directory`."""
    index, projection = trained(directory)
    for entries, keys in blocks:
        if len(entries):
            index.add_with_ids(keys if projection is None else projection(keys), entries)
    _write(index, path)


def remove(path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Take the entries [first, first + count) out of a part; those that are not in it are passed over."""
    index = faiss.read_index(str(path))
    for first, count in ranges:
        index.remove_ids(faiss.IDSelectorRange(first, first + count))
    _write(index, path)


def merge(paths: list[Path]) -> Any:
    """One index of all parts, for searching. Raises UserError naming a part that faiss cannot read."""
    merged = _read(paths[0])
    for path in paths[1:]:
        merged.merge_from(_read(path), 0)
    if merged.pq.nbits != 4:
        return merged
    fast = faiss.IndexIVFPQFastScan(merged)
    merged.own_fields, fast.own_fields = False, True  # of the coarse quantiser
    return fast


def _read(path: Path) -> Any:
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a readable part of a faiss index ({reason}); restore it, or make the datastore again") from None


def _write(index: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    faiss.write_index(index, str(temporary))
    _place(temporary, path)


def _place(temporary: Path, path: Path) -> None:
    artifacts.sync(temporary)
    os.replace(temporary, path)
    artifacts.sync(path.parent)
