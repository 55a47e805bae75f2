"""What heads learn from the heads they were (TinyBERT, Jiao et al. 2020, section 3.1, equation 7).

    L_attn = sum over layers of 1/h sum_i MSE(A_i^S, A_i^T),   A_i = Q_i K_i^T / sqrt(d_head) and what positions add to it,

the scores before the softmax, which TinyBERT found to be learnt faster than what comes after it. The mean is over pairs of tokens that see each
other; the official code's has padding in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.compression.sparsity import Prunable
from pipeline.objectives.base import Batch


class Origin(NamedTuple):
    """Where the heads of one of the student's layers come from: a layer of the teacher, and heads in it, both counted from 0."""

    layer: int
    heads: list[int]


def origins(masks: Mapping[str, Tensor], prunable: Prunable) -> list[Origin]:
    """Of a student without what these masks take, by unit: of each layer that has heads, from the lowest."""
    heads, layers = (masks.get(unit, torch.ones(prunable.shapes[unit])) for unit in ("heads", "attention"))
    return [Origin(layer, row.nonzero().flatten().tolist()) for layer, row in enumerate(heads * layers[:, None]) if row.any()]


def pairs(batch: Batch) -> Tensor:
    """Boolean [B, L, L]: of an encoder's tokens, which see each other, being of one row and of one document."""
    real = batch["attention_mask"].bool()
    seen = real[:, :, None] & real[:, None, :]
    documents = batch.get("document_ids")
    return seen if documents is None else seen & (documents[:, :, None] == documents[:, None, :])


def attention_loss(student: Sequence[Tensor | None], teacher: Sequence[Tensor | None], learnt: Sequence[Origin], seen: Tensor) -> Tensor:
    """L_attn, a scalar in fp32; 0 without pairs.

    student, teacher: of each layer the scores of its heads [B, heads, L, L], None where it has none; learnt: an origin for each of the student's
    that has; seen: see `pairs`.
    """
    rows, queries, keys = seen.nonzero(as_tuple=True)
    loss = torch.zeros((), device=seen.device)
    for made, (layer, heads) in zip((scores for scores in student if scores is not None), learnt, strict=True):
        goal = teacher[layer]
        assert goal is not None
        squares = F.mse_loss(made[rows, :, queries, keys].float(), goal[:, heads][rows, :, queries, keys].float(), reduction="sum")
        loss = loss + squares / max(1, len(rows) * len(heads))
    return loss
