"""Compression before any task: distillation on a plan's text (Jiao et al. 2020, section 3.2), and masks on a pretraining objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.compression.attention_distillation import Origin, attention_loss, pairs
from pipeline.compression.distillation import prediction_loss
from pipeline.compression.layer_distillation import teacher_layers
from pipeline.compression.masks import Masks
from pipeline.objectives.base import Batch, Objective
from pipeline.objectives.masking import Masking
from pipeline.objectives.mlm import INPUTS
from pipeline.objectives.settings import DistillSettings


class GeneralDistillation(Objective):
    """Losses `distill` (the teacher's distribution of each hidden token), `layers` (mean squared error of the embeddings and of each of the student's
    layers to evenly spaced ones of the teacher, summed), `attention` (of the scores in those layers, each head to the one it was) and `mlm` (the
    hidden tokens), each where it has a weight; `mlm` is logged always.

    teacher: a masked language model of the student's width and vocabulary, at least as deep. It is held outside the registered modules, so that
    nothing trains, shards or saves it.
    """

    def __init__(self, settings: DistillSettings, tokenizer: PreTrainedTokenizerBase, seed: int, teacher: nn.Module) -> None:
        super().__init__()
        self.settings, self.predicted = settings, settings.mask_rate
        self.masking = Masking(settings, tokenizer, seed)
        self.figures = frozenset() if settings.hard_labels else frozenset({"mlm"})
        self._teacher = (teacher.eval().requires_grad_(False),)  # a tuple: no submodule

    @property
    def loss_weights(self) -> dict[str, float]:
        settings = self.settings
        weights = {"distill": settings.prediction, "layers": settings.layers, "attention": settings.attention, "mlm": settings.hard_labels}
        return {name: weight for name, weight in weights.items() if weight}

    def prepare(self, batch: Batch, step: int) -> Batch:
        return self.masking(batch, step)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Hidden tokens; of `layers` all tokens, of `attention` pairs of them."""
        hidden, mask = (batch["labels"] != -100).sum(), batch["attention_mask"]
        counts = {"distill": hidden, "layers": mask.sum(), "attention": pairs(batch).sum(), "mlm": hidden}
        return {name: counts[name] for name in {"mlm", *self.loss_weights}}

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        given = {name: batch[name] for name in INPUTS if name in batch}
        asked = {"output_hidden_states": bool(self.settings.layers), "output_attention_scores": bool(self.settings.attention)}
        student = model(**given, **asked)
        (teacher,) = self._teacher
        with torch.no_grad():
            taught = teacher.to(student.logits.device, student.logits.dtype)(**given, **asked)
        losses = {"mlm": student.loss}
        if self.settings.prediction:
            losses["distill"] = prediction_loss(student.logits, taught.logits, self.settings.temperature) if len(student.logits) else student.loss
        if self.settings.layers:
            losses["layers"] = self._layers(student.hidden_states, taught.hidden_states, batch["attention_mask"].bool())
        if self.settings.attention:
            body: Any = model.base_model
            layers = teacher_layers(len(taught.attention_scores), len(body.layers))
            learnt = [Origin(layer, block.attention.kept) for layer, block in zip(layers, body.layers, strict=True)]
            losses["attention"] = attention_loss(student.attention_scores, taught.attention_scores, learnt, pairs(batch))
        return losses

    def _layers(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], real: Tensor) -> Tensor:
        matched = [0, *(layer + 1 for layer in teacher_layers(len(teacher) - 1, len(student) - 1))]
        pairs = zip(student, (teacher[layer] for layer in matched), strict=True)
        return sum((F.mse_loss(made[real].float(), goal[real].float()) for made, goal in pairs), torch.zeros((), device=real.device))


class Upstream(Objective):
    """A pretraining objective of a model with masks on its units, and the Lagrangian, `sparsity` (Xia et al. 2022, 2024).

    objective: one that only calls the model. masks: the trainee's side module.
    """

    def __init__(self, objective: Objective, masks: Masks) -> None:
        super().__init__()
        self.objective = objective
        self.predicted, self.figures, self.ratios = objective.predicted, objective.figures, objective.ratios
        self._masks = (masks,)  # a tuple: no submodule

    @property
    def loss_weights(self) -> dict[str, float]:
        return {**self.objective.loss_weights, "sparsity": 1.0}

    def prepare(self, batch: Batch, step: int) -> Batch:
        return self.objective.prepare(batch, step)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        rows = torch.tensor(len(batch["input_ids"]), device=batch["input_ids"].device)
        return {**self.objective.targets(batch), "sparsity": rows}

    def training_flops_per_row(self, length: int) -> float:
        return self.objective.training_flops_per_row(length)

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        (masks,) = self._masks
        losses = self.objective(_masked(model, masks.sample()), batch, step)
        return {**losses, "sparsity": masks.penalty()}


def _masked(model: nn.Module, masks: dict[str, Tensor] | None) -> Callable[..., Any]:
    return lambda **inputs: model(**inputs, masks=masks)
