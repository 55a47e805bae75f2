"""Two models, or two memories, compared on the same text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 1024
"""Places in a block: near ones go up and down together, so that blocks, not places, are taken as independent."""


def paired(a: NDArray[np.floating], b: NDArray[np.floating], block: int = BLOCK) -> tuple[float, float]:
    """Mean of a - b, losses [n] of the same places in nats, and its standard error over blocks of places.

    The error is that of the text, not of training. It is infinite for fewer than two blocks; a last block that is short counts by its length.
    """
    assert len(a) == len(b)
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    starts = np.arange(0, len(difference), block)
    if len(starts) < 2:
        return float(difference.mean()), float("inf")
    sums = np.add.reduceat(difference, starts)
    counts = np.diff(np.append(starts, len(difference)))
    mean = difference.mean()
    spread = ((sums - mean * counts) ** 2).sum() / (len(starts) - 1)  # of a block's sum; the mean is the sum of blocks / n
    return float(mean), float(np.sqrt(spread * len(starts)) / len(difference))
