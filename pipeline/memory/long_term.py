"""Long-term memory: the entries of places that were scored before the window, first in, first out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.memory.reading import Ints, Text


@dataclass(frozen=True)
class LongTerm:
    """What a place may see of what was scored before its window.

    size: entries kept. reset: only those of the place's own document. keep_duplicates: also those that the window reads again (Zhong et al.'s
    way: the last `size` scored places, whether or not the context holds them too).
    """

    size: int
    reset: bool = True
    keep_duplicates: bool = False

    def ranges(self, text: Text, windows: Ints, scored: Ints) -> tuple[Ints, Ints]:
        """Which entries, low .. high - 1, each scored place sees; int64 [n] each. An entry's number is that of its place among the scored.

        windows int64 [W, 3]; scored int64 [n]: the places that these windows score, in order.
        """
        window = np.repeat(np.arange(len(windows)), windows[:, 2] - windows[:, 1])
        first = np.searchsorted(scored, windows[:, 1])
        high = first if self.keep_duplicates else np.minimum(first, np.searchsorted(scored, windows[:, 0] + 1))
        low = np.maximum(first - self.size, 0)[window]
        if self.reset:
            bounds = text.beginnings()
            beginning = bounds[np.searchsorted(bounds, scored, side="right") - 1]
            low = np.maximum(low, np.searchsorted(scored, beginning))
        return np.minimum(low, high[window]), high[window]


class Held:
    """The keys [m, d] and values [m] of the entries `start` .. `start + m - 1`."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def end(self) -> int:
        return self.start + (0 if self.keys is None else len(self.keys))

    def extend(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys])
        self.values = values if self.values is None else torch.cat([self.values, values])

    def entries(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def forget(self, before: int) -> None:
        """Let go of the entries below that number."""
        if self.keys is not None and self.values is not None and before > self.start:
            drop = min(before, self.end) - self.start
            self.keys, self.values, self.start = self.keys[drop:].clone(), self.values[drop:].clone(), self.start + drop
