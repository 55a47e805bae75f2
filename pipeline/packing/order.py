"""The order of an epoch, and which part of a batch is whose: arithmetic on (seed, step, rank), no state."""

from __future__ import annotations

import numpy as np

from pipeline.packing.segments import Ints


def permutation(count: int, seed: int, epoch: int) -> Ints:
    """int64 [count], a pure function of its arguments: the rank of raw Philox keys, a stream that numpy keeps the same in all versions."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def share(count: int, rank: int, world: int) -> tuple[int, int]:
    """The contiguous part [first, last) of `count` things that is `rank`'s; parts differ by at most one."""
    return count * rank // world, count * (rank + 1) // world


class Order:
    """An endless sequence of `count` numbers: epoch after epoch, each shuffled anew. Holds one epoch's permutation."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def at(self, positions: Ints) -> Ints:
        """The numbers at those positions of the sequence; a batch may run over an epoch's end."""
        epochs, places = np.divmod(positions, self.count)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch, self._permutation = int(epoch), permutation(self.count, self.seed, int(epoch))
            here = epochs == epoch
            numbers[here] = self._permutation[places[here]]
        return numbers
