"""A smaller dense student of a teacher, to distil into: the alternative to pruning (Sanh et al. 2019, Jiao et al. 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.compression import surgery
from pipeline.compression.layer_distillation import teacher_layers
from pipeline.compression.shapes import Shape, highest
from pipeline.compression.sparsity import Prunable
from pipeline.models.modeling_trimline import TrimlinePreTrainedModel
from pipeline.objectives.settings import StudentSettings


@torch.no_grad()
def student(teacher: TrimlinePreTrainedModel, settings: StudentSettings) -> TrimlinePreTrainedModel:
    """A model of fewer layers, heads and neurons, with the teacher's embeddings, positions and head; the width is the teacher's.

    Its layers come from evenly spaced ones of the teacher, the last among them, each with the heads and neurons of largest weights; or they are
    drawn from torch's global generator.
    Raises UserError where the teacher is smaller than that, or was pruned.
    """
    shape = Shape(settings.layers, settings.heads, settings.ffn, Prunable.of(teacher.config).hidden)
    smaller = surgery.compact(surgery.remove(teacher, spaced(teacher, shape)))
    if settings.initial == "random":
        for module in smaller.base_model.layers.modules():  # type: ignore[union-attr]
            smaller._init_weights(module)
    return smaller.requires_grad_(True)  # the teacher may be frozen


@torch.no_grad()
def spaced(teacher: TrimlinePreTrainedModel, shape: Shape) -> dict[str, Tensor]:
    """Masks that leave evenly spaced layers, the last among them, and of each the heads and neurons of largest weights.

    Raises UserError where the teacher is smaller than the shape, or was pruned.
    """
    prunable = Prunable.of(teacher.config)
    shape.check(prunable)
    chosen = torch.zeros(prunable.layers, 1)
    chosen[list(teacher_layers(prunable.layers, shape.layers))] = 1
    blocks: list[Any] = list(teacher.base_model.layers)  # type: ignore[arg-type]
    heads, neurons = (torch.stack([scores_of(block) for block in blocks]) for scores_of in (_heads, _neurons))
    return {"heads": highest(heads, shape.heads) * chosen, "neurons": highest(neurons, shape.ffn) * chosen}


def _heads(block: Any) -> Tensor:
    """[heads]: the norm of each head's values times that of what it writes."""
    attention = block.attention
    values = attention.value.weight.unflatten(0, (-1, attention.head_dim)).flatten(1).norm(dim=1)
    written = attention.output.weight.unflatten(1, (-1, attention.head_dim)).norm(dim=(0, 2))
    return (values * written).cpu()


def _neurons(block: Any) -> Tensor:
    """[neurons]: the norm of what each reads times that of what it writes."""
    return (block.feed_forward.up.weight.norm(dim=1) * block.feed_forward.down.weight.norm(dim=0)).cpu()
