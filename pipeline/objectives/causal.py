"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.models.causal_reader import CausalReader
from pipeline.objectives.base import Batch, Objective

INPUTS = ("input_ids", "document_ids", "labels")
"""No attention mask: padding comes last, so causality hides it already, and attention runs its fast causal kernel."""


class Causal(Objective):
    """Loss `causal`: mean cross-entropy, in nats, of every token but the first of a row and, where attention stays inside
    documents (`document_ids` in the batch), of a document. Padding stands at the end of a row.

    chunk: rows of vocabulary scores held at a time; None: the model computes its own loss. memory_module: see `CausalReader`.
    """

    def __init__(self, chunk: int | None = None, memory_module: str | None = None):
        super().__init__()
        self.chunk, self.memory_module = chunk, memory_module
        self._reader: CausalReader | None = None

    def prepare(self, batch: Batch, step: int) -> Batch:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if "document_ids" in batch:
            documents = batch["document_ids"]
            labels[:, 1:].masked_fill_(documents[:, 1:] != documents[:, :-1], -100)
        return {**batch, "labels": labels}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        return {"causal": (batch["labels"][:, 1:] != -100).sum()}

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        if self.chunk is None:
            return {"causal": model(**{name: batch[name] for name in INPUTS if name in batch}).loss}
        hidden, _, labelled = self.read(model, batch)
        partition, target = self.reader(model).scores(hidden[labelled], batch["labels"][:, 1:][labelled], self.chunk)
        return {"causal": (partition - target).sum() / max(len(target), 1)}

    def reader(self, model: Any) -> CausalReader:
        if self._reader is None or self._reader.model is not model:
            self._reader = CausalReader(model, self.memory_module)
        return self._reader

    def read(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, L - 1, h] and memory states [B, L - 1, d] before each next token, and where that is a target: bool [B, L - 1]."""
        hidden, memory = self.reader(model).read(**{name: batch[name] for name in ("input_ids", "document_ids") if name in batch})
        return hidden[:, :-1], memory[:, :-1], batch["labels"][:, 1:] != -100
