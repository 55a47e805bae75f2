"""Scores of a few candidates of the vocabulary at each position, without their embeddings [N, k, d]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Positions whose candidates' embeddings are held at a time: at k = 10 and d = 768 about 2 MB, which stay in a CPU's cache."""


def candidate_scores(hidden: Tensor, weight: Tensor, candidates: Tensor) -> Tensor:
    """<hidden[n], weight[candidates[n, j]]>, fp32 [N, k].   hidden [N, d], weight [V, d], candidates int64 [N, k].

    Embeddings are looked up again in the backward pass: on a CPU a third of the time of keeping them, at 4096 x 9 candidates of width 768.
    """
    return _CandidateScores.apply(hidden, weight, candidates)


class _CandidateScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, candidates: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, candidates)
        scores = hidden.new_empty(candidates.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, chosen in _chunks(weight, candidates, scores.dtype):
                scores[rows] = torch.bmm(chosen, hidden[rows].to(scores.dtype).unsqueeze(2)).squeeze(2)
        return scores

    @staticmethod
    def backward(ctx: Any, d_scores: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, candidates = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=d_scores.dtype)
        for rows, chosen in _chunks(weight, candidates, d_scores.dtype):
            d_hidden[rows] = torch.bmm(d_scores[rows].unsqueeze(1), chosen).squeeze(1).to(hidden.dtype)
            d_chosen = d_scores[rows].unsqueeze(2) * hidden[rows].unsqueeze(1)
            d_weight.index_put_((candidates[rows],), d_chosen, accumulate=True)  # on a GPU always in the same order, unlike index_add_
        return d_hidden, d_weight.to(weight.dtype), None


def _chunks(weight: Tensor, candidates: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Slices of positions, and the embeddings [n, k, d] of their candidates."""
    size = CHUNK if candidates.device.type == "cpu" else 16 * CHUNK
    for start in range(0, len(candidates), size):
        rows = slice(start, start + size)
        yield rows, F.embedding(candidates[rows], weight).to(dtype)
