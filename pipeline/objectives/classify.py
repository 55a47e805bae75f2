"""A label, or a number, for each row: what fine-tuning learns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.objectives.base import Batch, Objective

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What of a batch a classifier reads."""


class Classify(Objective):
    """Loss `classify`: mean cross-entropy of the classes in nats, or mean squared error where labels are numbers."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        return batch

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        return {"classify": torch.tensor(len(batch["labels"]), device=batch["labels"].device)}

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        logits = model(**{name: batch[name] for name in INPUTS if name in batch}).logits
        return {"classify": label_loss(logits, batch["labels"])}


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, classes] with class numbers int64 [B], or [B, 1] with numbers float [B]; computed in fp32."""
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0].float(), labels.float())
    return F.cross_entropy(logits.float(), labels)
