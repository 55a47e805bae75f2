"""Scores of queries against a memory, summed in blocks: two log sums a query, and their gradients, without the matrix of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Visible = Callable[[slice, slice], Tensor]
"""(groups, rows) -> bool, broadcast to [groups, rows, up to M]: which entries those queries see. Entries beyond its last column are not seen."""


def log_sums(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    key_targets: Tensor,
    visible: Visible,
    *,
    scale: float,
    chunk: int | None = None,
    key_gradient: Visible | None = None,
) -> tuple[Tensor, Tensor]:
    """Log sum exp of the scores `scale * <query, key>` of all entries that a query sees, and of those among them with its target.

    queries [G, R, d], targets int64 [G, R], keys [G, M, d], key_targets int64 [G, M]; both results [G, R], fp32 (fp64 for such inputs), -inf
    where there is nothing to sum. chunk: queries whose scores are held at a time, forward and, computed again, backward; None: all.
    key_gradient: through which scores the gradient reaches the keys, as `visible`; None: through all. It always reaches the queries.
    """
    if torch.is_autocast_enabled(queries.device.type):
        narrow = torch.get_autocast_dtype(queries.device.type)
        queries, keys = queries.to(narrow), keys.to(narrow)
    return _LogSums.apply(queries, targets, keys, key_targets, visible, scale, chunk, key_gradient)


class _LogSums(torch.autograd.Function):
    """With S the scores, A and B the two log sums:  dS = dA exp(S - A) + dB [target] exp(S - B).

    Scores and sums are held to base 2: on a CPU, exp takes ten to a hundred times as long for what underflows (and -inf), exp2 does not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        targets: Tensor,
        keys: Tensor,
        key_targets: Tensor,
        visible: Visible,
        scale: float,
        chunk: int | None,
        key_gradient: Visible | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(queries.dtype, torch.float32)
        every = queries.new_empty(queries.shape[:2], dtype=dtype)
        positive = torch.empty_like(every)
        for at in _blocks(queries, chunk):
            scores, other = _scores(at, queries, targets, keys, key_targets, visible, scale)
            every[at] = _log2_sum(scores)
            positive[at] = _log2_sum(scores.masked_fill_(other, -torch.inf))
        ctx.save_for_backward(queries, targets, keys, key_targets, every, positive)
        ctx.visible, ctx.scale, ctx.chunk, ctx.key_gradient = visible, scale, chunk, key_gradient
        return every * math.log(2), positive * math.log(2)

    @staticmethod
    def backward(ctx: Any, d_every: Tensor, d_positive: Tensor) -> tuple[Tensor | None, ...]:
        queries, targets, keys, key_targets, every, positive = ctx.saved_tensors
        every, positive = (sums.masked_fill(sums == -torch.inf, 0).unsqueeze(-1) for sums in (every, positive))  # exp(-inf - 0) is 0
        d_every, d_positive = d_every * ctx.scale, d_positive * ctx.scale
        d_queries, d_keys = torch.empty_like(queries), torch.zeros_like(keys, dtype=every.dtype)
        for at in _blocks(queries, ctx.chunk):
            scores, other = _scores(at, queries, targets, keys, key_targets, ctx.visible, ctx.scale)
            groups, seen = at[0], slice(scores.shape[-1])
            d_scores = (scores - every[at]).exp2_().mul_(d_every[at].unsqueeze(-1))
            d_scores.addcmul_(scores.masked_fill_(other, -torch.inf).sub_(positive[at]).exp2_(), d_positive[at].unsqueeze(-1))
            d_queries[at] = d_scores.to(keys.dtype) @ keys[groups, seen]
            if ctx.key_gradient is not None:
                d_scores.masked_fill_(~ctx.key_gradient(*at)[..., seen], 0)
            d_keys[groups, seen] += d_scores.to(queries.dtype).transpose(1, 2) @ queries[at]
        return d_queries, None, d_keys.to(keys.dtype), None, None, None, None, None


def _scores(
    at: tuple[slice, slice], queries: Tensor, targets: Tensor, keys: Tensor, key_targets: Tensor, visible: Visible, scale: float
) -> tuple[Tensor, Tensor]:
    """Of one block, the scores to base 2 [g, r, M'], -inf where an entry is not seen, and which entries have another value than the target."""
    seen = visible(*at)
    groups, columns = at[0], slice(seen.shape[-1])
    with torch.autocast(queries.device.type, enabled=False):
        scores = torch.baddbmm(queries.new_empty(1), queries[at], keys[groups, columns].transpose(1, 2), beta=0, alpha=scale / math.log(2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill_(~seen, -torch.inf)
    return scores, key_targets[groups, None, columns] != targets[at].unsqueeze(-1)


def _log2_sum(scores: Tensor) -> Tensor:
    """logsumexp to base 2 over the last dimension."""
    if not scores.shape[-1]:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    best = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
    return scores.sub(best).exp2_().sum(-1).log2_().add_(best.squeeze(-1))


def _blocks(queries: Tensor, chunk: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most `chunk` queries [G, R, d]: several whole groups, or a part of one."""
    groups, rows, _ = queries.shape
    chunk = groups * rows if chunk is None else chunk
    together = max(chunk // max(rows, 1), 1)
    for first in range(0, groups, together):
        for start in range(0, rows, min(chunk, rows)):
            yield slice(first, first + together), slice(start, start + min(chunk, rows))
