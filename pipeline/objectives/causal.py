"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.objectives.base import Batch, Objective

INPUTS = ("input_ids", "document_ids", "labels")
"""No attention mask: padding comes last, so causality hides it already, and attention runs its fast causal kernel."""


class Causal(Objective):
    """Loss `causal`: mean cross-entropy, in nats, of every token but the first of a row and, where attention stays inside
    documents (`document_ids` in the batch), of a document. Padding stands at the end of a row.
    """

    def prepare(self, batch: Batch, step: int) -> Batch:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if "document_ids" in batch:
            documents = batch["document_ids"]
            labels[:, 1:].masked_fill_(documents[:, 1:] != documents[:, :-1], -100)
        return {**batch, "labels": labels}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        return {"causal": (batch["labels"][:, 1:] != -100).sum()}

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"causal": model(**{name: batch[name] for name in INPUTS if name in batch}).loss}
