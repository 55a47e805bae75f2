"""The vocabulary's side of a softmax: log partition and target score, a block of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scores_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets int64 [N] -> log sum exp over V and the target's logit, both fp32 [N]. Their difference is the cross-entropy."""
    logits = logits.float()
    return torch.logsumexp(logits, dim=1), logits.gather(1, targets[:, None]).squeeze(1)


def linear_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """`scores_of(hidden @ weight.T + bias, targets)` without holding more than `chunk` rows of logits, computed again in the backward pass.

    hidden [N, h], weight [V, h], bias [V]. Chunks of 128 to 512 rows are faster than the whole on a CPU, since they stay in its caches.
    """
    if chunk is None:
        return scores_of(F.linear(hidden, weight, bias), targets)
    return _LinearScores.apply(hidden, weight, bias, targets, chunk)


class _LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        partition = torch.empty(len(hidden), device=hidden.device)
        target = torch.empty_like(partition)
        for rows in _blocks(len(hidden), chunk):
            partition[rows], target[rows] = scores_of(_logits(hidden[rows], weight, bias), targets[rows])
        ctx.save_for_backward(hidden, weight, bias, targets, partition)
        ctx.chunk = chunk
        return partition, target

    @staticmethod
    def backward(ctx: Any, d_partition: Tensor, d_target: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, partition = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, device=weight.device)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _blocks(len(hidden), ctx.chunk):
            d_logits = _logits(hidden[rows], weight, bias).sub_(partition[rows, None]).exp_().mul_(d_partition[rows, None])
            d_logits.scatter_add_(1, targets[rows, None], d_target[rows, None])
            narrow = d_logits.to(hidden.dtype)
            d_hidden[rows] = narrow @ weight.to(hidden.dtype)
            d_weight += narrow.T @ hidden[rows]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return d_hidden, d_weight.to(weight.dtype), None if bias is None or d_bias is None else d_bias.to(bias.dtype), None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)).float()


def _blocks(count: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, count, chunk)]
