"""The whole distribution over the vocabulary at one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.memory.kinds import Memory, Part
from pipeline.memory.mixtures import Pair, Values, predict

Entries = tuple[NDArray[np.floating], NDArray[np.int64]]
"""scores [m] = <q, k> / sqrt(d) and values int64 [m] of a memory's entries; those of the store by falling score."""


@dataclass(frozen=True)
class Place:
    """Evidence (`mixtures.Evidence`) about one place, with every token of the vocabulary in turn as the target.

    logits [V]: the vocabulary's scores, whose log sum exp is the partition. entries: of each part.
    """

    logits: NDArray[np.floating]
    entries: Mapping[Part, Entries]

    @property
    def partition(self) -> NDArray[np.floating]:
        return np.logaddexp.reduce(self.target, keepdims=True)

    @property
    def target(self) -> NDArray[np.floating]:
        return self.logits.astype(np.float64)

    def pair(self, part: Part, temperature: float, neighbours: int | None = None) -> Pair:
        """log sum exp of all the part's scores, [1], and of those of each token's entries, [V]."""
        scores, values = self.entries[part]
        found = ~np.isneginf(scores[:neighbours])
        scores, values = scores[:neighbours][found].astype(np.float64) / temperature, values[:neighbours][found]
        of_token = np.full(len(self.logits), -np.inf)
        np.logaddexp.at(of_token, values, scores)
        return np.logaddexp.reduce(scores, keepdims=True, initial=-np.inf), of_token


def log_distribution(memory: Memory, place: Place, values: Values) -> NDArray[np.floating]:
    """log P of each token, [V], with that memory: their exponentials sum to 1."""
    return predict(memory, place, values).log_probability
