"""Sums over the entries of a memory, in fp32, a block at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ROWS, ENTRIES = 128, 2048
"""Queries and entries, of one group or several, whose scores are held at a time: 1 MiB of them, and as much again for each of about four
intermediates. They stay in the cache while every temperature passes over them: nearly three times as quick as blocks of 8 MiB."""


def over_range(queries: Tensor, keys: Tensor, values: Tensor, targets: Tensor, low: Tensor, high: Tensor, temperatures: Sequence[float]) -> Tensor:
    """fp32 [2, g, n, T]: log sum exp of <q, k> / (sqrt(d) t) over the entries low .. high - 1 of each query's group, and over those of them
    whose value is its target.

    Of each of g groups: queries [g, n, d], keys [g, m, d], values int64 [g, m], targets, low, high int64 [g, n], all on one device.
    """
    found = torch.full((2, *queries.shape[:2], len(temperatures)), -torch.inf, device=queries.device)
    scaled = queries.float() / queries.shape[2] ** 0.5
    together = max(ROWS * ENTRIES // max(min(queries.shape[1], ROWS) * min(keys.shape[1], ENTRIES), 1), 1)
    for groups, rows in itertools.product(_blocks(len(queries), together), _blocks(queries.shape[1], ROWS)):
        here = groups, rows
        for entries in _blocks(int(high[here].max()), ENTRIES, int(low[here].min())):
            number = torch.arange(entries.start, entries.stop, device=queries.device)
            visible = (number >= low[here][..., None]) & (number < high[here][..., None])
            scores = (scaled[here] @ keys[groups, entries].float().mT).masked_fill_(~visible, -torch.inf)
            match = visible & (values[groups, None, entries] == targets[here][..., None])
            summed = of_scores(scores.flatten(0, 1), match.flatten(0, 1), temperatures).unflatten(1, scores.shape[:2])
            found[:, groups, rows] = torch.logaddexp(found[:, groups, rows], summed)
    return found


def _blocks(end: int, size: int, start: int = 0) -> list[slice]:
    return [slice(first, min(first + size, end)) for first in range(start, end, size)]


def over_nearest(scores: Tensor, values: Tensor, targets: Tensor, neighbours: Sequence[int], temperatures: Sequence[float]) -> Tensor:
    """fp32 [2, n, K, T]: the same over the first k of each query's entries, for each k of `neighbours`, which rise.

    scores [n, k] falling, -inf where there is no entry; values int64 [n, k]; targets int64 [n].
    """
    parts = []
    for rows in _blocks(len(scores), ROWS):
        match = (values[rows] == targets[rows, None]) & ~scores[rows].isneginf()
        bounds = [0, *neighbours]
        slices = [of_scores(scores[rows, a:b], match[:, a:b], temperatures) for a, b in itertools.pairwise(bounds)]
        parts.append(torch.stack(slices, dim=2).logcumsumexp(dim=2))
    return torch.cat(parts, dim=1) if parts else torch.empty(2, 0, len(neighbours), len(temperatures))


def of_scores(scores: Tensor, match: Tensor, temperatures: Sequence[float]) -> Tensor:
    """fp32 [2, n, T]: log sum exp of scores [n, m] / t, and of those where match [n, m] is true; -inf where there are none.

    The matches, few, are summed by themselves, so that they do not vanish beside scores that are much larger.
    """
    return torch.stack([_log_sums(scores, temperatures), _log_sums(_gathered(scores, match), temperatures)])


def _log_sums(scores: Tensor, temperatures: Sequence[float]) -> Tensor:
    if not scores.shape[1]:
        return torch.full((len(scores), len(temperatures)), -torch.inf, device=scores.device)
    top = scores.amax(dim=1, keepdim=True)
    below, heated = scores - top.nan_to_num(neginf=0.0), torch.empty_like(scores)
    summed = [torch.mul(below, 1 / t, out=heated).exp_().sum(dim=1).log_() for t in temperatures]
    return torch.stack(summed, dim=1) + top / torch.tensor(temperatures, device=scores.device)


def _gathered(scores: Tensor, match: Tensor) -> Tensor:
    """The scores where match is true, moved to the left of their rows: [n, the most matches of a row], -inf behind them."""
    rows, columns = match.nonzero(as_tuple=True)
    counts = match.sum(dim=1)
    place = torch.arange(len(rows), device=scores.device) - (counts.cumsum(0) - counts)[rows]
    gathered = torch.full((len(scores), int(counts.max()) if len(counts) else 0), -torch.inf, device=scores.device)
    gathered[rows, place] = scores[rows, columns]
    return gathered
