"""Masked language modelling (Devlin et al. 2019): predict the tokens that were hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.objectives.base import Batch, Objective
from pipeline.objectives.settings import MlmSettings
from pipeline.packing.draws import uniform

SELECT, REPLACE, TOKEN = 0, 1, 2
"""Streams of draws: which positions are targets, what becomes of them, which random token."""

INPUTS = ("input_ids", "attention_mask", "document_ids", "labels")
"""What of a batch the model reads."""


class Mlm(Objective):
    """Loss `mlm`: mean cross-entropy of the targets, in nats.

    Each token that is neither special nor padding is a target with probability `mask_rate`, by draws of (seed, step, segment).
    A row with tokens has at least one target, as BERT's own had, so short rows have a little more than the rate says.
    """

    special: Tensor

    def __init__(self, settings: MlmSettings, tokenizer: PreTrainedTokenizerBase, seed: int):
        super().__init__()
        if tokenizer.mask_token_id is None:
            raise UserError(f"objective mlm needs a mask token; the tokenizer {tokenizer.name_or_path} has none: add one, or use objective causal")
        self.settings = settings
        self.seed = seed
        self.predicted = settings.mask_rate
        self.mask_token = tokenizer.mask_token_id
        self.vocab_size = len(tokenizer)
        self.register_buffer("special", torch.tensor(sorted(tokenizer.all_special_ids)), persistent=False)

    def prepare(self, batch: Batch, step: int) -> Batch:
        input_ids, segment = batch["input_ids"], batch["segment"]
        length = input_ids.shape[1]
        maskable = (batch["attention_mask"] == 1) & ~torch.isin(input_ids, self.special.to(input_ids.device))
        target = self._targets(uniform(self.seed, step, segment, length, SELECT), maskable)

        fate = uniform(self.seed, step, segment, length, REPLACE)
        random_token = (uniform(self.seed, step, segment, length, TOKEN) * self.vocab_size).long()
        masked = target & (fate < self.settings.mask_token_rate)
        randomised = target & ~masked & (fate < self.settings.mask_token_rate + self.settings.random_token_rate)
        corrupted = torch.where(randomised, random_token, input_ids).masked_fill(masked, self.mask_token)
        return {**batch, "input_ids": corrupted, "labels": input_ids.masked_fill(~target, -100)}

    def _targets(self, draw: Tensor, maskable: Tensor) -> Tensor:
        """Positions drawn below the rate; in a row that has none, its lowest draw. All are boolean or float [B, L]."""
        draw = draw.masked_fill(~maskable, torch.inf)
        drawn = draw < self.settings.mask_rate
        lowest = draw == draw.min(dim=1, keepdim=True).values
        return torch.where(drawn.any(dim=1, keepdim=True), drawn, lowest & maskable)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        return {"mlm": (batch["labels"] != -100).sum()}

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"mlm": model(**{name: batch[name] for name in INPUTS if name in batch}).loss}
