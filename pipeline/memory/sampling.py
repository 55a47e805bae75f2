"""How a token is drawn from a distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """greedy: the likeliest token. Else one of the `top_k` likeliest, and of those that first reach
    `top_p` together, with log probabilities divided by `temperature`; the same seed draws the same text."""

    greedy: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 1

    def draw(self, log_probability: NDArray[np.floating], draws: np.random.Generator) -> int:
        """A token of the vocabulary; log_probability [V]."""
        if self.greedy:
            return int(log_probability.argmax())
        likeliest = np.argsort(-log_probability, kind="stable")[: self.top_k]
        scores = log_probability[likeliest] / self.temperature
        weights = np.exp(scores - scores[0])
        sums = np.cumsum(weights / weights.sum())
        sums = sums[: int(np.searchsorted(sums, self.top_p)) + 1]
        at = int(np.searchsorted(sums, draws.random() * sums[-1], side="right"))
        return int(likeliest[min(at, len(sums) - 1)])
