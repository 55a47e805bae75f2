"""The vocabulary's side of a softmax: log partition and target score, a block of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scores_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N, V], targets int64 [N] -> log sum exp over V and the target's logit, both [N]. Their difference is the cross-entropy.

    In fp32, in fp64 where the logits are.
    """
    logits = _wide(logits)
    return torch.logsumexp(logits, dim=1), logits.gather(1, targets[:, None]).squeeze(1)


def linear_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """`scores_of(hidden @ weight.T + bias, targets)` without holding more than `chunk` rows of logits, computed again in the backward pass.

    hidden [N, h], weight [V, h], bias [V]. Chunks of 128 to 512 rows are faster than the whole on a CPU, since they stay in its caches.
    """
    if chunk is None:
        return scores_of(F.linear(hidden, weight, bias), targets)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return _LinearScores.apply(hidden, weight, bias, targets, chunk)


class _LinearScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        partition = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        target = torch.empty_like(partition)
        narrow_weight = weight.to(hidden.dtype)
        for rows in _blocks(len(hidden), chunk):
            partition[rows], target[rows] = scores_of(_logits(hidden[rows], narrow_weight, bias), targets[rows])
        ctx.save_for_backward(hidden, weight, bias, targets, partition)
        ctx.chunk = chunk
        return partition, target

    @staticmethod
    def backward(ctx: Any, d_partition: Tensor, d_target: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, partition = ctx.saved_tensors
        narrow_weight = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=partition.dtype)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=partition.dtype)
        for rows in _blocks(len(hidden), ctx.chunk):
            d_logits = _logits(hidden[rows], narrow_weight, bias).sub_(partition[rows, None]).exp_().mul_(d_partition[rows, None])
            d_logits.scatter_add_(1, targets[rows, None], d_target[rows, None])
            narrow = d_logits.to(hidden.dtype)
            d_hidden[rows] = narrow @ narrow_weight
            d_weight += narrow.T @ hidden[rows]
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return d_hidden, d_weight.to(weight.dtype), None if bias is None or d_bias is None else d_bias.to(bias.dtype), None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return _wide(F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _blocks(count: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, count, chunk)]
