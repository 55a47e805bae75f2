"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.objectives.base import Batch, Objective


class Causal(Objective):
    """Loss `causal`: mean cross-entropy of every token but a row's first, in nats. Padding stands at the end of a row."""

    def prepare(self, batch: Batch, step: int) -> Batch:
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        return {"causal": (batch["labels"][:, 1:] != -100).sum()}

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        # No attention mask: padding comes last, so causality hides it already, and attention runs its fast causal kernel.
        return {"causal": model(input_ids=batch["input_ids"], labels=batch["labels"]).loss}
