"""Inverted lists of product-quantised keys (Jegou et al. 2011), by faiss; before them, principal components, all of them or fewer.

One trained quantiser makes a part of every shard; the parts are merged when the datastore is opened, and 4-bit codes laid out for
SIMD look-ups (Andre et al. 2015).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.errors import UserError
from pipeline.memory.settings import IndexSettings

Floats = NDArray[np.float32]

SAMPLE = 64
"""Keys that it is trained on for each list, or each value of a code where those are more; faiss asks for 39."""
COMPONENTS = 128
"""Dimensions searched at most, unless the recipe says otherwise, where keys are kept and what is found is scored with all of them."""
PARTS = 64
"""Sub-quantisers at most, unless the recipe names more."""


@dataclass(frozen=True)
class Projection:
    """Keys and queries as they are searched: of r dimensions, the nearest by Euclidean distance being those with the highest scores.

    Principal components, all or some, turned at random so that each carries as much: states of transformers have a few large dimensions,
    which would take up the codes. For inner products a further coordinate of the keys, sqrt(radius - |k|^2), makes all keys equally long
    (Bachrach et al. 2014): then |q - k|^2 = |q|^2 + radius - 2 <q, k>. Codes err less so than on inner products themselves, to which
    what all keys have in common adds most.

    components float32 [r, d]; mean float32 [d] of the keys; lift float32 [r], the direction of the further coordinate; radius: the largest
    |k|^2, or 0 for Euclidean distance; spread: mean square of what the components leave out.
    """

    components: Floats
    mean: Floats
    lift: Floats
    radius: float
    spread: float

    @classmethod
    def of(cls, keys: Floats, dimensions: int, metric: str, seed: int) -> Projection:
        """From a sample of the keys, float32 [n, d]. With inner products the further coordinate takes the place of the least component."""
        values, vectors = np.linalg.eigh(np.cov(keys, rowvar=False).astype(np.float64))
        turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((dimensions, dimensions)))[0]
        kept = dimensions - (metric == "ip")
        components = np.ascontiguousarray(turn[:, :kept] @ vectors[:, ::-1][:, :kept].T, dtype=np.float32)
        lift = turn[:, -1].astype(np.float32) if metric == "ip" else np.zeros(dimensions, dtype=np.float32)
        radius = float(np.square(keys).sum(axis=1).max()) if metric == "ip" else 0.0
        return cls(components, keys.mean(axis=0), lift, radius, float(values[: len(values) - kept].sum()))

    def keys(self, keys: Floats) -> Floats:
        """[n, d] -> [n, r]."""
        narrow = (keys - self.mean) @ self.components.T
        if self.radius:
            narrow += np.sqrt(np.maximum(self.radius - np.square(keys).sum(axis=1, keepdims=True), 0)) * self.lift
        return np.ascontiguousarray(narrow, dtype=np.float32)

    def queries(self, queries: Floats) -> Floats:
        """[n, d] -> [n, r]."""
        return np.ascontiguousarray((queries - self.mean) @ self.components.T)

    def similarity(self, queries: Floats, distances: Floats) -> Floats:
        """Inner products, or squared distances, of whole vectors from squared distances [n, k] of narrow ones and the rest's mean."""
        centred = queries - self.mean
        left_out = np.square(centred).sum(axis=1, keepdims=True) - np.square(centred @ self.components.T).sum(axis=1, keepdims=True)
        whole = distances + left_out + np.float32(self.spread)
        if not self.radius:
            return whole
        return (np.square(queries).sum(axis=1, keepdims=True) + np.float32(self.radius) - whole) / 2

    def save(self, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **asdict(self))
        _place(temporary, path)

    @classmethod
    def open(cls, path: Path) -> Projection:
        with np.load(path, allow_pickle=False) as found:
            return cls(found["components"], found["mean"], found["lift"], float(found["radius"]), float(found["spread"]))


def lists_for(entries: int) -> int:
    """About 4 sqrt(entries), a power of 2, from 16 to 65,536."""
    return int(2 ** np.clip(np.round(np.log2(4 * np.sqrt(max(entries, 1)))), 4, 16))


def bits_of(settings: IndexSettings) -> int:
    return settings.bits or (4 if settings.keep_keys else 8)


def dimensions_of(settings: IndexSettings, width: int) -> int:
    """Of a search in keys of so many."""
    return settings.reduce or (min(width, COMPONENTS) if settings.keep_keys else width)


def sample(settings: IndexSettings, entries: int, seed: int) -> NDArray[np.int64]:
    """int64, rising: the entries that the quantiser is trained on."""
    count = SAMPLE * max(settings.lists or lists_for(entries), 1 << bits_of(settings))
    return np.sort(np.random.default_rng(seed).choice(entries, min(count, entries), replace=False)).astype(np.int64)


def train(directory: Path, keys: Floats, entries: int, settings: IndexSettings, seed: int) -> None:
    """Write `projection.npz`, then `quantiser.faiss`. keys: float32 [n, d], a sample of the `entries`.

    Raises UserError when the settings do not suit the keys.
    """
    dimensions, bits = dimensions_of(settings, keys.shape[1]), bits_of(settings)
    if dimensions > keys.shape[1]:
        raise UserError(f"index.reduce {dimensions} exceeds the {keys.shape[1]} dimensions of a key; lower it, or leave it out")
    if len(keys) < 1 << bits:
        raise UserError(f"index.kind: {len(keys)} keys are too few to train codes of {bits} bits; set index.kind=flat")
    parts = _subquantizers(settings, dimensions)
    lists = min(settings.lists or lists_for(entries), len(keys))
    projection = Projection.of(keys, dimensions, settings.metric, seed)
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(dimensions), dimensions, lists, parts, bits)
    index.cp.seed = index.pq.cp.seed = seed % (1 << 31)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # the sample is what there is
    index.train(projection.keys(keys))
    projection.save(directory / "projection.npz")
    _write(index, directory / "quantiser.faiss")


def _subquantizers(settings: IndexSettings, dimensions: int) -> int:
    if settings.subquantizers is None:
        return max(parts for parts in range(1, PARTS + 1) if dimensions % parts == 0 and (parts == 1 or dimensions // parts >= 2))
    if dimensions % settings.subquantizers:
        raise UserError(f"index.subquantizers {settings.subquantizers} is not a divisor of the {dimensions} dimensions that are searched")
    return settings.subquantizers


def write_part(path: Path, directory: Path, blocks: Iterable[tuple[NDArray[np.int64], Floats]]) -> None:
    """The inverted lists of some entries, made with the quantiser of `directory`."""
    index, projection = faiss.read_index(str(directory / "quantiser.faiss")), Projection.open(directory / "projection.npz")
    for entries, keys in blocks:
        if len(entries):
            index.add_with_ids(projection.keys(keys), np.ascontiguousarray(entries))
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
