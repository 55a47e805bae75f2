"""What a student learns from its teacher: Hinton et al. 2015, as CoFi uses it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compression.masks import Masks
from pipeline.compression.settings import DistillationSettings
from pipeline.objectives.base import Batch, Objective
from pipeline.objectives.classify import INPUTS, label_loss


def prediction_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the softened classes, mean over rows, in fp32. student, teacher: logits [B, classes]."""
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the predicted numbers, in fp32: the soft labels of a regression. student, teacher: [B, 1]."""
    return F.mse_loss(student.float(), teacher.float())


class Distillation(Objective):
    """Named losses `distill` (soft labels), `hard` (true labels, where its weight is not 0) and `sparsity` (the Lagrangian, with masks).

    teacher: a classifier with the student's labels. It is held outside the registered modules, so that nothing trains, shards or saves it.
    masks: the side module of a pruning; None where the student is fine-tuned as it is.
    """

    def __init__(self, teacher: nn.Module, settings: DistillationSettings, masks: Masks | None = None) -> None:
        super().__init__()
        self.settings = settings
        self._beside = (teacher.eval().requires_grad_(False), masks)  # a tuple: not submodules

    @property
    def loss_weights(self) -> dict[str, float]:
        """What the settings give each named loss; the Lagrangian brings its own weight, the multipliers."""
        weights = {"distill": self.settings.prediction, "hard": self.settings.hard_labels, "sparsity": 1.0}
        return {name: weights[name] for name in self._names()}

    def prepare(self, batch: Batch, step: int) -> Batch:
        return batch

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        rows = torch.tensor(len(batch["labels"]), device=batch["labels"].device)
        return dict.fromkeys(self._names(), rows)

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        teacher, masks = self._beside
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        student = model(**inputs, masks=masks.sample() if masks else None).logits
        with torch.no_grad():
            soft = teacher.to(student.device, student.dtype)(**inputs).logits
        regression = student.shape[-1] == 1
        losses = {"distill": output_loss(student, soft) if regression else prediction_loss(student, soft, self.settings.temperature)}
        if self.settings.hard_labels:
            losses["hard"] = label_loss(student, batch["labels"])
        if masks:
            losses["sparsity"] = masks.penalty()
        return losses

    def _names(self) -> list[str]:
        return ["distill", *["hard"] * bool(self.settings.hard_labels), *["sparsity"] * (self._beside[1] is not None)]
