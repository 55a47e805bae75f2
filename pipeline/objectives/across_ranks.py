"""Rows that several ranks hold parts of: gathered with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def team(ranks: int) -> Any:
    """The process group of this rank and those that share its groups: `ranks` that follow one another. Every rank must call it."""
    if ranks == distributed.get_world_size():
        return distributed.group.WORLD
    return distributed.new_subgroups(group_size=ranks)[0]


def gather(rows: Tensor, ranks: Any) -> Tensor:
    """[G, R, ...] of each rank of a process group -> [G, ranks x R, ...], in the order of ranks, on every one of them.

    The gradient of a rank's rows is the sum of what all of them send back: the paper's own code stops it there.
    """
    return _Gather.apply(rows, ranks)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Any) -> Tensor:
        ctx.ranks = ranks
        size = distributed.get_world_size(ranks)
        gathered = rows.new_empty((size * len(rows), *rows.shape[1:]))
        distributed.all_gather_into_tensor(gathered, rows.contiguous(), group=ranks)
        return gathered.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None]:
        size, rank = distributed.get_world_size(ctx.ranks), distributed.get_rank(ctx.ranks)
        parts = d_gathered.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
        if distributed.get_backend(ctx.ranks) == "nccl":
            mine = torch.empty_like(parts[0])
            distributed.reduce_scatter_tensor(mine, parts, group=ctx.ranks)
            return mine, None
        distributed.all_reduce(parts, group=ctx.ranks)
        return parts[rank], None
