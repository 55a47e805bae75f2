"""What a student learns from its teacher: soft labels (Hinton et al. 2015) and hidden states, as CoFi uses them (Xia et al. 2022, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compression.attention_distillation import Origin, attention_loss, pairs
from pipeline.compression.layer_distillation import LayerDistillation, layers_left
from pipeline.compression.masks import Masks, alive
from pipeline.compression.settings import DistillationSettings
from pipeline.compression.teachers import Recorded
from pipeline.objectives.base import Batch, Objective
from pipeline.objectives.classify import INPUTS, label_loss
from pipeline.objectives.span import scores_of_tokens, span_loss


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float, real: Tensor | None = None) -> Tensor:
    """T^2 KL(teacher || student) of the softened classes, mean over rows, in fp32. student, teacher: logits [B, classes].

    real: [B, classes], 0 for what is no choice, as padding is none of an answer's tokens.
    """
    real = torch.ones_like(student) if real is None else real
    log_student, log_teacher = (F.log_softmax(scores_of_tokens(logits.float() / temperature, real), dim=-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the predicted numbers, in fp32: the soft labels of a regression. student, teacher: [B, 1]."""
    return F.mse_loss(student.float(), teacher.float())


def label_losses(model: nn.Module, masks: dict[str, Tensor], batch: Batch) -> Tensor:
    """The sum over a batch's rows of the loss of their labels, of a model with masks."""
    output = model(**{name: batch[name] for name in INPUTS if name in batch}, masks=masks)
    return _hard(output, batch) * len(batch["input_ids"])


class Distillation(Objective):
    """Named losses, each where it has a weight: `distill` (soft labels), `layers` (hidden states), `attention` (its scores), `hard` (true labels),
    and with masks `sparsity` (the Lagrangian). Logged besides: `matched_3`, which of the student's layers learns the teacher's third, counted from 1.

    teacher: a model with the student's outputs, a classifier, a regressor or one for answers that are spans; or what it said of each training row. It
    is held outside the registered modules, so that nothing trains, shards or saves it.
    layers: the layer-wise loss, whose map of the student's states is trained with the student.
    heads: where the student's come from; None: their scores are not learnt.
    masks: the side module of a pruning; None where the student is trained as it is.
    """

    def __init__(
        self,
        teacher: nn.Module | Recorded,
        settings: DistillationSettings,
        masks: Masks | None = None,
        layers: LayerDistillation | None = None,
        heads: Sequence[Origin] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        if isinstance(teacher, nn.Module):
            teacher = teacher.eval().requires_grad_(False)
        self._beside = (teacher, masks)  # a tuple: not submodules
        self.layers, self.heads = layers, heads
        self._matched = [f"matched_{layer + 1}" for layer in layers.taught] if layers is not None else []
        self.figures = frozenset(self._matched)

    @property
    def loss_weights(self) -> dict[str, float]:
        """What the settings give each named loss; the Lagrangian brings its own weight, the multipliers."""
        settings, masks = self.settings, self._beside[1]
        weights = {
            "distill": settings.prediction,
            "layers": settings.layers * (self.layers is not None),
            "attention": settings.attention * (self.heads is not None),
            "hard": settings.hard_labels,
        }
        return {name: weight for name, weight in weights.items() if weight} | ({"sparsity": 1.0} if masks is not None else {})

    def prepare(self, batch: Batch, step: int) -> Batch:
        return batch

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Rows; of hidden states, tokens; of attention, pairs of them."""
        mask, names = batch["attention_mask"], [*self.loss_weights, *self._matched]
        others = {"layers": mask.sum(), "attention": pairs(batch).sum()}
        rows = torch.tensor(len(mask), device=mask.device)
        return {name: others.get(name, rows) for name in names}

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        masks, weights = self._beside[1], self.loss_weights
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        drawn = masks.sample() if masks is not None else None
        asked = {"output_hidden_states": self.layers is not None, "output_attention_scores": "attention" in weights}
        student = model(**inputs, masks=drawn, **asked)
        teacher = self._teach(student, inputs, batch, asked) if weights.keys() & {"distill", "layers", "attention"} else {}
        losses = {}
        if "distill" in weights:
            losses["distill"] = self._soft(student, teacher, batch["attention_mask"])
        if self.layers is not None:
            living = _alive(model.config, drawn, masks)
            losses["layers"], matched = self.layers(teacher["hidden_states"][1:], student["hidden_states"][1:], batch["attention_mask"], living)
            losses |= dict(zip(self._matched, matched.float() + 1, strict=True))
        if "attention" in weights:
            assert self.heads is not None
            losses["attention"] = attention_loss(student["attention_scores"], teacher["attention_scores"], self.heads, pairs(batch))
        if "hard" in weights:
            losses["hard"] = _hard(student, batch)
        if masks is not None:
            losses["sparsity"] = masks.penalty()
        return losses

    @torch.no_grad()
    def _teach(self, student: Mapping[str, Any], inputs: Batch, batch: Batch, asked: Mapping[str, bool]) -> Mapping[str, Any]:
        """What the teacher gives for a batch: by the names of a model's outputs."""
        like: Tensor = student["logits"] if "logits" in student else student["start_logits"]
        teacher = self._beside[0]
        if isinstance(teacher, Recorded):
            return teacher.outputs(batch["example"], batch["attention_mask"])
        found: Mapping[str, Any] = teacher.to(like.device, like.dtype)(**inputs, **asked)
        return found

    def _soft(self, student: Mapping[str, Any], teacher: Mapping[str, Any], attention_mask: Tensor) -> Tensor:
        temperature = self.settings.temperature
        if "logits" not in student:
            start, end = (
                prediction_loss(ours, theirs, temperature, attention_mask) for ours, theirs in zip(_spans(student), _spans(teacher), strict=True)
            )
            return (start + end) / 2
        ours, theirs = student["logits"], teacher["logits"]
        return output_loss(ours, theirs) if ours.shape[-1] == 1 else prediction_loss(ours, theirs, temperature)


def _hard(output: Mapping[str, Any], batch: Batch) -> Tensor:
    return label_loss(output["logits"], batch["labels"]) if "logits" in output else span_loss(*_spans(output), batch)


def _spans(output: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return output["start_logits"], output["end_logits"]


def _alive(config: Any, drawn: dict[str, Tensor] | None, masks: Masks | None) -> Tensor:
    """bool [layers]: which have a sub-layer left, in the student and in this step's masks."""
    left = torch.tensor(layers_left(config))
    if drawn is None or masks is None:
        return left
    living = alive(drawn, masks.prunable)
    both = living["attention"] | living["feedforward"]
    return left.to(both.device) & both
