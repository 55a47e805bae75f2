"""Multi-head self-attention: one result by whichever exact way is the faster on the device, and rows without their padding.

Depends on torch alone, because it travels with exported models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import SCHEMES, rotate

MOST = 0.9
"""Share of open units from which a layer computes them all: picking them out has its price."""


@dataclass(frozen=True)
class Packing:
    """Which tokens of [B, L] rows are real: `places` int64 [T], numbered row by row; `shape` (B, L)."""

    places: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, real: Tensor) -> Packing | None:
        """real: boolean [B, L]. None where all are."""
        places = real.flatten().nonzero()[:, 0]
        return cls(places, (real.shape[0], real.shape[1])) if len(places) < real.numel() else None

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [T, d]."""
        return x.flatten(0, 1).index_select(0, self.places)

    def unpack(self, x: Tensor) -> Tensor:
        """[T, d] -> [B, L, d], zeros at padding."""
        return x.new_zeros(math.prod(self.shape), x.shape[1]).index_copy(0, self.places, x).unflatten(0, self.shape)


def linear(layer: nn.Linear, x: Tensor, *, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
    """layer(x), or of its outputs those of these numbers alone, or from those inputs alone, which x then is; the rest costs nothing."""
    if outputs is not None:
        return F.linear(x, layer.weight.index_select(0, outputs), layer.bias.index_select(0, outputs))
    if inputs is not None:
        return F.linear(x, layer.weight.index_select(1, inputs), layer.bias)
    return layer(x)


def open_units(mask: Tensor | None) -> Tensor | None:
    """Of a mask [units], the numbers of those that are not 0, or 0 where there are none; None where most are open, or rows differ.

    The others need not be computed: they add nothing, and of a hard-concrete mask that is clipped at 0 neither unit nor mask gets a gradient.
    """
    if mask is None or mask.dim() > 1:
        return None
    found = mask.detach().nonzero()[:, 0]
    if len(found) >= MOST * len(mask):
        return None
    return found if len(found) else found.new_zeros(1)


class Attention(nn.Module):
    """Multi-head self-attention of `heads` heads of fixed width; kept: which of those that positions know, None for the first."""

    def __init__(self, config: Any, heads: int, kept: list[int] | None):
        super().__init__()
        width = heads * config.head_dim
        self.head_dim = config.head_dim
        self.kept = kept or list(range(heads))
        self.scale = 1 / math.sqrt(SCHEMES[config.positions].terms * config.head_dim)
        self.causal = config.kind == "decoder"
        self.dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.query = nn.Linear(config.hidden_size, width)
        self.key = nn.Linear(config.hidden_size, width)
        self.value = nn.Linear(config.hidden_size, width)
        self.output = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        rotation: Tensor | None,
        packing: Packing | None,
        head_mask: Tensor | None,
        output_scores: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, L, d], or [T, d] of a packing; mask and bias: see `attend`, for the heads of the dense model; head_mask [heads] or
        [B, heads].

        Returns the shape of x, and where asked for the scores of the heads computed [B, heads, L, L], before softmax and before anything is hidden.
        """
        opened, rows = open_units(head_mask), None
        if opened is not None:
            assert head_mask is not None
            head_mask, rows = head_mask[opened], (opened[:, None] * self.head_dim + torch.arange(self.head_dim, device=x.device)).flatten()
        made = (linear(project, x, outputs=rows) for project in (self.query, self.key, self.value))
        projected = [side if packing is None else packing.unpack(side) for side in made]
        query, key, value = (side.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for side in projected)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if mask is not None and bias is not None:
            kept = self.kept if opened is None else [self.kept[head] for head in opened.tolist()]
            mask, bias = (side if side.shape[1] == len(kept) else side[:, kept] for side in (mask.to(query.dtype), bias))
        scores = torch.add(query @ key.transpose(2, 3) * self.scale, 0 if bias is None else bias) if output_scores else None
        context = attend(query, key, value, mask, bias, self.dropout if self.training else 0.0, self.causal and mask is None, self.scale)
        if head_mask is not None:
            context = (context * head_mask[..., None, None]).to(x.dtype)
        context = context.transpose(1, 2).flatten(2)
        return linear(self.output, context if packing is None else packing.pack(context), inputs=rows), scores


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, dropout: float, causal: bool, scale: float) -> Tensor:
    """softmax(query key^T scale + mask) value; query, key and value [B, heads, L, head_dim].

    mask: true where a query may look, or added to the scores, broadcast to [B, heads, L, L]; then bias [1 or B, heads, L, L] is what it was made
    of, before anything was hidden.
    PyTorch's kernel, but for a bias that is learned, on a CPU: there the kernel gives up its fused form for one that takes half as long again as
    ours (benchmarks/attention.py).
    """
    learned = bias is not None and bias.requires_grad and query.device.type == "cpu" and query.dtype == torch.float32
    if mask is None or not learned:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal, scale=scale)
    return _LearnedBias.apply(query, key, value, mask.detach(), bias, dropout, scale)


class _LearnedBias(torch.autograd.Function):
    """Scores, softmax and product of a few heads or rows at a time, so that they stay in the cache, forward and backward.

    The gradient of the scores goes to the bias, which rows may share, and not to the mask, which has a copy for each row.
    """

    CELLS = 2**18
    """Scores in work at a time, of which there are up to four kinds: 1 MiB each."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor, dropout: float, scale: float) -> Tensor:
        query, mask = query * scale, mask.expand(len(query), -1, -1, -1)
        weights, context = query.new_empty(mask.shape), torch.empty_like(query)
        kept = torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        for at in _parts(weights):
            scores = weights[at].flatten(0, 1)
            torch.baddbmm(mask[at].flatten(0, 1), query[at].flatten(0, 1), key[at].flatten(0, 1).transpose(1, 2), out=scores)
            torch.softmax(scores, dim=-1, out=scores)
            context[at] = (_dropped(scores, kept, dropout, at) @ value[at].flatten(0, 1)).view_as(context[at])
        ctx.save_for_backward(query, key, value, weights, kept)
        ctx.dropout, ctx.scale, ctx.shape = dropout, scale, bias.shape
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, kept = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(side) for side in (query, key, value))
        to_bias = query.new_zeros(ctx.shape)
        for at in _parts(weights):
            part, to_context = weights[at].flatten(0, 1), grad[at].flatten(0, 1)
            to_value[at] = (_dropped(part, kept, ctx.dropout, at).transpose(1, 2) @ to_context).view_as(grad[at])
            to_weights = to_context @ value[at].flatten(0, 1).transpose(1, 2)
            if kept is not None:
                to_weights.mul_(kept[at].flatten(0, 1)).div_(1 - ctx.dropout)
            to_scores = torch._softmax_backward_data(to_weights, part, -1, part.dtype)
            by_row = to_scores.view_as(weights[at])
            if len(to_bias) == len(weights):
                to_bias[at] = by_row
            else:
                to_bias[0, at[1]].add_(by_row[0] if len(by_row) == 1 else by_row.sum(0))
            to_query[at] = (to_scores @ key[at].flatten(0, 1)).view_as(grad[at])
            to_key[at] = (to_scores.transpose(1, 2) @ query[at].flatten(0, 1)).view_as(grad[at])
        return to_query.mul_(ctx.scale), to_key, to_value, None, to_bias, None, None


def _parts(weights: Tensor) -> Iterator[tuple[slice, slice]]:
    """(rows, heads) by which weights [B, heads, L, L] are worked through: several whole rows, or heads of one; all rows of some heads first, which
    share a bias."""
    rows, heads, length, _ = weights.shape
    heads_together = min(heads, max(1, _LearnedBias.CELLS // max(1, length**2)))
    rows_together = max(1, _LearnedBias.CELLS // max(1, heads * length**2))
    for first in range(0, heads, heads_together):
        for row in range(0, rows, rows_together):
            yield slice(row, row + rows_together), slice(first, first + heads_together)


def _dropped(weights: Tensor, kept: Tensor | None, dropout: float, at: tuple[slice, slice]) -> Tensor:
    return weights if kept is None else (weights * kept[at].flatten(0, 1)).div_(1 - dropout)
