"""MC-BERT (Xu et al. 2020, "MC-BERT: Efficient Language Pre-Training via a Meta Controller"): choose the original token among k options.

The first option is to reject the others: the token shown is right. The meta-controller, a small encoder trained by masked language modelling beside
the model, fills in what was hidden and makes the other options, which therefore get harder as it learns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.objectives.base import Batch
from pipeline.objectives.candidate_scores import candidate_scores
from pipeline.objectives.replaced_tokens import ReplacedTokens
from pipeline.objectives.settings import MetaControllerSettings


class Choice(NamedTuple):
    """corrupted: int64 [N], the tokens shown. others: int64 [N, k - 1], the options besides rejecting. excluded: bool [N, k - 1], which are left out.
    replaced: bool [N], where the token shown is wrong: the answer is then `others[:, 0]`, else to reject."""

    corrupted: Tensor
    others: Tensor
    excluded: Tensor
    replaced: Tensor


def choice(input_ids: Tensor, labels: Tensor, drawn: Tensor, duplicates: str) -> Choice:
    """The task at N places. input_ids [N] as masked, labels [N] (-100 where nothing was hidden), drawn [N, k] by the controller: all int64.

    The first token drawn is shown where one was hidden. Where it is wrong, the truth takes the second one's place; scores know nothing of places.
    Others drawn may also be the truth: with duplicates `exclude` they are left out, with `keep` they count as wrong, as in the paper's code.
    """
    hidden = labels != -100
    corrupted = torch.where(hidden, drawn[:, 0], input_ids)
    replaced = hidden & (corrupted != labels)
    others = drawn[:, 1:].clone()
    others[:, 0] = torch.where(replaced, labels, others[:, 0])
    excluded = torch.zeros_like(others, dtype=torch.bool)
    if duplicates == "exclude":
        excluded[:, 1:] = replaced[:, None] & (others[:, 1:] == labels[:, None])
    return Choice(corrupted, others, excluded, replaced)


class MetaController(ReplacedTokens):
    """Loss `choice`, besides the controller's `mlm`: mean cross-entropy of the right option over all tokens but padding.

    The score of a token a is <h, E_a> + b_a, with h the state that the model's own vocabulary head makes; rejecting has a vector and a bias
    of its own.

    Figures, means over what was hidden: `replaced`, `corrected` (replaced, and the truth chosen), `kept` (the controller drew the truth), `accepted`
    (kept, and rejecting chosen); `accuracy_shown`, over what was never hidden: rejecting chosen. Quotients are the accuracies on the other two kinds.
    """

    figures = frozenset({"replaced", "corrected", "kept", "accepted", "accuracy_shown"})
    ratios = {"accuracy_replaced": ("corrected", "replaced"), "accuracy_kept": ("accepted", "kept")}  # noqa: RUF012 never changed

    def __init__(self, settings: MetaControllerSettings, tokenizer: PreTrainedTokenizerBase, seed: int, model: PretrainedConfig):
        super().__init__(settings, tokenizer, seed, model)
        if settings.options > len(tokenizer):
            raise UserError(
                f"pretrain.objective.options {settings.options} is more than the vocabulary has, {len(tokenizer)} tokens; set it to that or fewer"
            )
        self.drawn, self.duplicates, self.weight = settings.options, settings.duplicates, settings.weight
        self.neither = nn.Parameter(torch.randn(model.hidden_size) * model.initializer_range)
        self.neither_bias = nn.Parameter(torch.zeros(1))

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"choice": self.weight}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        hidden, tokens = (batch["labels"] != -100).sum(), batch["attention_mask"].sum()
        return {"mlm": hidden, "choice": tokens, "accuracy_shown": tokens - hidden} | dict.fromkeys(self.figures - {"accuracy_shown"}, hidden)

    def training_flops_per_row(self, length: int) -> float:
        d = len(self.neither)
        own = 6.0 * length * d * (d + self.drawn)
        return own + self.generator.training_flops_per_row(length, self.mask_rate, drawn=1.0)

    def forward(self, model: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        tokens = batch["attention_mask"] == 1
        bias = model.head.decoder.bias
        mlm, drawn = self.fill_in(model, bias, batch, step, tokens)
        task = choice(batch["input_ids"][tokens], batch["labels"][tokens], drawn, self.duplicates)
        state = self.read(model, batch, batch["input_ids"].masked_scatter(tokens, task.corrupted))[tokens]
        state = model.head.norm(F.gelu(model.head.dense(state)))
        scores = self.scores(state, model.get_input_embeddings().weight, bias, task)
        hidden, right = batch["labels"][tokens] != -100, scores.detach().argmax(1) == task.replaced
        counts, kept = self.targets(batch), hidden & ~task.replaced
        sums = {
            "choice": F.cross_entropy(scores, task.replaced.long(), reduction="sum"),
            "replaced": task.replaced.sum(),
            "corrected": (task.replaced & right).sum(),
            "kept": kept.sum(),
            "accepted": (kept & right).sum(),
            "accuracy_shown": (~hidden & right).sum(),
        }
        return {"mlm": mlm, **{name: total / counts[name].clamp(min=1) for name, total in sums.items()}}

    def scores(self, state: Tensor, embedding: Tensor, bias: Tensor, task: Choice) -> Tensor:
        """fp32 [N, k] of states [N, d]: of rejecting, then of the other options; -inf where one is excluded. embedding [V, d], bias [V]."""
        reject = (state @ self.neither + self.neither_bias).float()
        others = candidate_scores(state, embedding, task.others) + bias[task.others].float()
        return torch.cat([reject[:, None], others.masked_fill(task.excluded, -torch.inf)], dim=1)
