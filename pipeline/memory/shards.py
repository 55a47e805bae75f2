"""Shards of entries: keys float16 [n, d] and values int32 [n] in a directory that is complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import artifacts
from pipeline.errors import UserError
from pipeline.memory import description
from pipeline.memory.description import Description

Keys = NDArray[np.float16]
Values = NDArray[np.int32]

REMOVED = -1
"""The value of an entry that was removed."""
BLOCK = 1 << 16
"""Keys taken from disk at a time."""


def write(directory: Path, keys: Keys, values: Values) -> None:
    """One shard, by one rename."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, array in (("keys", keys), ("values", values)):
        np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        artifacts.sync(temporary / f"{name}.npy")
    artifacts.sync(temporary)
    os.rename(temporary, directory)
    artifacts.sync(directory.parent)


@dataclass(frozen=True)
class Shards:
    """All shards of a datastore, mapped from disk: what is removed there meanwhile is removed here.

    keys: float16 [n, d] a shard, none where keys were dropped; values: int32 [n] a shard; starts: int64 [shards + 1], each shard's first entry.
    """

    keys: list[Keys]
    values: list[Values]
    starts: NDArray[np.int64]

    @classmethod
    def open(cls, directory: Path, about: Description, *, writable: bool = False) -> Shards:
        """Raises UserError when an array is not what the description says."""
        counts = np.array(about["shards"], dtype=np.int64)
        places = [description.shard(directory, number) for number in range(len(counts))]
        mode = "r+" if writable else "r"
        values = [_load(place / "values.npy", np.int32, (int(n),), mode) for place, n in zip(places, counts, strict=True)]
        kept = about["keep_keys"]
        shapes = [(int(n), about["dimensions"]) for n in counts] if kept else []
        keys = [_load(place / "keys.npy", np.float16, shape, mode) for place, shape in zip(places, shapes, strict=False)]
        return cls(keys, values, np.append(0, np.cumsum(counts)).astype(np.int64))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Entries int64 [b] and their keys float32 [b, d], in order, without those removed."""
        for start, keys, values in zip(self.starts, self.keys, self.values, strict=False):
            for first in range(0, len(values), BLOCK):
                there = np.flatnonzero(values[first : first + BLOCK] != REMOVED)
                block = keys[first : first + BLOCK].astype(np.float32)
                yield start + first + there, block if len(there) == len(block) else block[there]

    def sample(self, entries: NDArray[np.int64]) -> NDArray[np.float32]:
        """Keys float32 [n, d] of entries in rising order."""
        cuts = np.searchsorted(entries, self.starts)
        pairs = zip(self.keys, self.starts, cuts[:-1], cuts[1:], strict=False)
        return np.concatenate([keys[entries[a:b] - start].astype(np.float32) for keys, start, a, b in pairs])

    def values_of(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64, of the shape of `entries`; -1 where the entry was removed or is -1 itself."""
        found = np.full(entries.shape, REMOVED, dtype=np.int64)
        owner = np.searchsorted(self.starts, entries, side="right") - 1
        for number, (start, values) in enumerate(zip(self.starts, self.values, strict=False)):
            mine = (owner == number) & (entries >= 0)
            found[mine] = values[entries[mine] - start]
        return found

    def erase(self, first: int, count: int) -> list[int]:
        """Overwrite entries on disk: the value first, so that no reader meets a value without its key. Returns the shards touched."""
        touched = []
        for number, (start, values) in enumerate(zip(self.starts, self.values, strict=False)):
            here = slice(max(first - int(start), 0), max(min(first + count - int(start), len(values)), 0))
            if here.start < here.stop:
                touched.append(number)
                values[here] = REMOVED
                _flush(values)
                if self.keys:
                    self.keys[number][here] = 0
                    _flush(self.keys[number])
        return touched


def _load(path: Path, kind: type, shape: tuple[int, ...], mode: str) -> NDArray:
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)  # type: ignore[arg-type]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable array ({error}); restore it, or make the datastore again") from None
    if array.dtype != kind or array.shape != shape:
        raise UserError(
            f"{path}: {array.dtype} {array.shape}, {description.NAME} says {np.dtype(kind)} {shape}; restore it, or make the datastore again"
        )
    return array


def _flush(array: NDArray) -> None:
    assert isinstance(array, np.memmap)
    array.flush()
