"""The first and the last token of an answer: what fine-tuning on questions learns (Devlin et al. 2019, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.objectives.base import Batch, Objective
from pipeline.objectives.classify import INPUTS


class Span(Objective):
    """Loss `span`: mean of the cross-entropies of start and end, in nats, over the tokens of a row that are not padding."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        return batch

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        return {"span": torch.tensor(len(batch["start_positions"]), device=batch["start_positions"].device)}

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        output = model(**{name: batch[name] for name in INPUTS if name in batch})
        return {"span": span_loss(output.start_logits, output.end_logits, batch)}


def span_loss(start_logits: Tensor, end_logits: Tensor, batch: Batch) -> Tensor:
    """start_logits, end_logits [B, L]; batch: `start_positions`, `end_positions` [B], `attention_mask` [B, L]."""
    start, end = (scores_of_tokens(logits, batch["attention_mask"]) for logits in (start_logits, end_logits))
    return (F.cross_entropy(start, batch["start_positions"]) + F.cross_entropy(end, batch["end_positions"])) / 2


def scores_of_tokens(logits: Tensor, attention_mask: Tensor) -> Tensor:
    """logits [B, L] in fp32, padding out of the question: a row's loss does not depend on how far it is padded."""
    return logits.float().masked_fill(attention_mask == 0, torch.finfo(torch.float32).min)
