"""ELECTRA (Clark et al. 2020): tell for each token whether it is the original or the generator's."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.models import size
from pipeline.objectives.base import Batch
from pipeline.objectives.generator import initialise
from pipeline.objectives.replaced_tokens import ReplacedTokens
from pipeline.objectives.settings import ElectraSettings


class Electra(ReplacedTokens):
    """Loss `discriminate`, besides the generator's: mean binary cross-entropy of all tokens but padding. A token that the generator
    drew as it was counts as the original.

    Figures, means over what was hidden: `replaced`, `found` (replaced, and told so); over all tokens: `original`, `trusted` (original, and told so).
    Their quotients are the accuracies on either kind.
    """

    drawn = 1
    figures = frozenset({"replaced", "found", "original", "trusted"})
    ratios = {"accuracy_replaced": ("found", "replaced"), "accuracy_original": ("trusted", "original")}  # noqa: RUF012 never changed

    def __init__(self, settings: ElectraSettings, tokenizer: PreTrainedTokenizerBase, seed: int, model: PretrainedConfig):
        super().__init__(settings, tokenizer, seed, model)
        self.weight = settings.weight
        d = model.hidden_size
        self.head = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, 1))
        initialise(self.head, self.generator.body.config)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"discriminate": self.weight}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        hidden, tokens = (batch["labels"] != -100).sum(), batch["attention_mask"].sum()
        return {"mlm": hidden, "replaced": hidden, "found": hidden, "discriminate": tokens, "original": tokens, "trusted": tokens}

    def training_flops_per_row(self, length: int) -> float:
        return 6.0 * length * size.parameters(self.head) + self.generator.training_flops_per_row(length, self.mask_rate, drawn=self.mask_rate)

    def forward(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        hidden, tokens = batch["labels"] != -100, batch["attention_mask"] == 1
        mlm, drawn = self.fill_in(model, None, batch, step, hidden)
        corrupted = batch["input_ids"].masked_scatter(hidden, drawn)
        replaced = (hidden & (corrupted != batch["labels"]))[tokens]
        scores = self.head(self.read(model, batch, corrupted)[tokens]).squeeze(-1).float()
        counts = self.targets(batch)
        told = scores.detach() > 0
        sums = {
            "discriminate": F.binary_cross_entropy_with_logits(scores, replaced.float(), reduction="sum"),
            "replaced": replaced.sum(),
            "found": (replaced & told).sum(),
            "original": (~replaced).sum(),
            "trusted": (~replaced & ~told).sum(),
        }
        return {"mlm": mlm, **{name: total / counts[name].clamp(min=1) for name, total in sums.items()}}
