"""Heads and neurons dealt among the layers so that they are worth the most in the time that they may take.

The first head or neuron of a layer costs many times what one more does, so that few full layers hold more in a time than many thin ones. A threshold
for all units does not see it, and leaves layers of a neuron.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.compression.latency import Table
from pipeline.compression.sparsity import FINE, realised

BINS = 2000
"""That the time to be dealt is cut into."""


def deal(table: Table, masks: Mapping[str, Tensor], worth: Mapping[str, Tensor], share: float, steps: Mapping[str, int]) -> dict[str, Tensor]:
    """The masks with other numbers of heads and neurons in the layers, which take `share` of the whole encoder's time or less.

    Attention and feed-forward have each the part of the time that the masks gave it; of a layer its best units stay. Units without masks of their own
    stay as they are, and so do all where nothing would be left.
    worth: of heads and neurons, 0 or more. steps: by unit, what their number in a layer is to be a multiple of, where it is not all.
    """
    kept = {unit: (mask > 0).float() for unit, mask in masks.items()}
    times = {layer: table.time_of(layer, kept).item() for layer in FINE}
    dealt = {layer: fine for layer, fine in FINE.items() if fine in masks}
    spent = sum(times[layer] for layer in dealt)
    if not spent:
        return dict(masks)
    free = share * table.dense - sum(times.values()) + spent
    found = dict(masks)
    for layer, fine in dealt.items():
        numbers = np.arange(masks[fine].shape[-1] + 1)
        allowed = numbers[(numbers % steps.get(fine, 1) == 0) | (numbers == numbers[-1])]
        budget = max(times[layer] / spent * free, 1e-9)
        costs = table.times(layer, torch.from_numpy(allowed).to(masks[fine].device), kept).double().cpu().numpy() / budget
        counts = _fullest(worth[fine].double().cpu().numpy(), allowed, costs)
        ranks = worth[fine].argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        best = ranks < torch.from_numpy(counts).to(ranks.device)[:, None]
        found |= {fine: _opened(masks[fine], best)} | ({layer: _opened(masks[layer], best.any(-1))} if layer in masks else {})
    return found if realised(table.saved, found) < 1 else dict(masks)


def _fullest(worth: np.ndarray, numbers: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """How many units of each layer are worth the most together: [layers].

    The multiple-choice knapsack by dynamic programming, of costs rounded up to a bin; Kurtic et al. 2023, section 3.2, choose blocks by it.
    worth [layers, units]: the best of a layer go first. numbers, rising from 0: of units that a layer may have, at these costs, which do not fall;
    all layers may cost 1.
    """
    bins = np.ceil(costs * BINS - 1e-6)
    fits = (bins <= BINS) & (np.append(bins[1:], np.inf) > bins)  # of numbers at one cost the largest
    numbers, bins = numbers[fits], bins[fits].astype(int)
    gains = np.pad(np.cumsum(-np.sort(-worth, axis=1), axis=1), ((0, 0), (1, 0)))[:, numbers]
    best, choices = np.zeros(BINS + 1), []
    for gain in gains:
        trials = np.full((len(numbers), BINS + 1), -np.inf)
        for trial, cost, value in zip(trials, bins, gain, strict=True):
            trial[cost:] = best[: BINS + 1 - cost] + value
        choices.append(trials.argmax(axis=0))
        best = trials.max(axis=0)
    left, counts = BINS, []
    for choice in reversed(choices):
        counts.append(numbers[choice[left]])
        left -= bins[choice[left]]
    return np.array(counts[::-1])


def _opened(mask: Tensor, best: Tensor) -> Tensor:
    """The mask where it is to stay; where it was 0, the smallest value it has anywhere."""
    smallest = torch.where(mask > 0, mask, torch.inf).min()
    return torch.where(best, torch.where(mask > 0, mask, smallest), 0.0)
