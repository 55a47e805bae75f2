"""Masked language modelling (Devlin et al. 2019): predict the tokens that were hidden."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.objectives.base import Batch, Objective
from pipeline.objectives.masking import Masking
from pipeline.objectives.settings import MaskingSettings

INPUTS = ("input_ids", "attention_mask", "document_ids", "labels")
"""What of a batch the model reads."""


class Mlm(Objective):
    """Loss `mlm`: mean cross-entropy of the targets, in nats."""

    def __init__(self, settings: MaskingSettings, tokenizer: PreTrainedTokenizerBase, seed: int):
        super().__init__()
        self.predicted = settings.mask_rate
        self.masking = Masking(settings, tokenizer, seed)

    def prepare(self, batch: Batch, step: int) -> Batch:
        return self.masking(batch, step)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        return {"mlm": (batch["labels"] != -100).sum()}

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        given = {name: batch[name] for name in INPUTS if name in batch}
        if self.notes is None:
            return {"mlm": model(**given).loss}
        output = model(**given, input_mixer=self.notes.mixer(batch))
        self.notes.collect(batch, output.last_hidden_state)
        return {"mlm": output.loss}
