"""Which segments share a memory in training."""

from __future__ import annotations

import numpy as np

from pipeline.packing.segments import Ints


def singles(count: int) -> Ints:
    """Groups of one: int64 [count, 1]."""
    return np.arange(count, dtype=np.int64)[:, None]


def consecutive(documents: Ints, size: int) -> Ints:
    """`size` neighbours of one document, in order: int64 [G, size], -1 where a document's last group is short.

    documents: int64 [N], the document of each segment; those of one document stand together.
    """
    numbers = np.arange(len(documents), dtype=np.int64)
    begins = np.diff(documents, prepend=-1) != 0
    place = numbers - np.maximum.accumulate(np.where(begins, numbers, 0))
    slot = place % size
    group = np.cumsum(slot == 0) - 1
    groups = np.full((int(group[-1]) + 1 if len(group) else 0, size), -1, dtype=np.int64)
    groups[group, slot] = numbers
    return groups
