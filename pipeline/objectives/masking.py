"""Which tokens are hidden, and what stands in their place (Devlin et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.objectives.base import Batch
from pipeline.objectives.settings import MaskingSettings
from pipeline.packing.draws import uniform

SELECT, REPLACE, TOKEN = 0, 1, 2
"""Streams of draws: which positions are targets, what becomes of them, which random token. Objectives' own begin at 3."""


class Masking:
    """Each token that is neither special nor padding is a target with probability `mask_rate`, by draws of (seed, step, segment).

    With `whole_word` it is words that are drawn, each with all its tokens. A row with tokens has at least one target, as BERT's own had, so
    short rows have a little more than the rate says.
    Raises UserError for a tokenizer without a mask token.
    """

    def __init__(self, settings: MaskingSettings, tokenizer: PreTrainedTokenizerBase, seed: int):
        if tokenizer.mask_token_id is None:
            raise UserError(
                f"objective {settings.name} needs a mask token; the tokenizer {tokenizer.name_or_path} has none: add one, or use objective causal"
            )
        self.settings, self.seed = settings, seed
        self.mask_token, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))

    def __call__(self, batch: Batch, step: int) -> Batch:
        """The batch with targets hidden in `input_ids` and their tokens in `labels`, both int64 [B, L]; -100 is no target.

        Reads `input_ids`, `attention_mask`, `segment`, and for whole words `word` [B, L]: tokens of a row with the same number are a word.
        """
        input_ids, segment = batch["input_ids"], batch["segment"]
        length = input_ids.shape[1]
        maskable = (batch["attention_mask"] == 1) & ~torch.isin(input_ids, self._special.to(input_ids.device))
        draw = uniform(self.seed, step, segment, length, SELECT)
        if self.settings.whole_word:
            draw = _of_first(draw, batch["word"])
        target = self._targets(draw, maskable)

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


def _of_first(draw: Tensor, word: Tensor) -> Tensor:
    """For each token the draw of its word's first token. word: int64 [B, L], a word's tokens together; -1, no word, keeps its own draw."""
    places = torch.arange(word.shape[1], device=word.device)
    begins = torch.ones_like(word, dtype=torch.bool)
    begins[:, 1:] = (word[:, 1:] != word[:, :-1]) | (word[:, 1:] < 0)
    return draw.gather(1, (places * begins).cummax(dim=1).values)
