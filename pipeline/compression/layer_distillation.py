"""Layer-wise distillation with a mapping found on the fly (CoFi, Xia et al. 2022, section 3.3, equation 4).

Chosen layers of the teacher, a, are each matched with a layer m(a) of the student:

    L_layer = sum over a of MSE(W H_student[m(a)], H_teacher[a]),   m(a) = argmin over j of MSE(W H_student[j], H_teacher[a]),

W one linear map, the identity at first. The mean is over tokens that are not padding, of which the official code takes no account.

While masks are trained, the nearest layer is almost always the one of that depth. Of what a strong pruning leaves it need not be: the lowest layer
left may be the nearest to several of the teacher's, learn them all, and so stay the nearest, while those above learn little. Rule `fixed`, the
recovery's, pairs layers once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compression.settings import LayerMapping
from pipeline.models.modeling_trimline import TrimlineConfig


def teacher_layers(layers: int, matched: int = 4) -> tuple[int, ...]:
    """Of so many layers, those that are taught, counted from 0: evenly spaced up to the last. Of 12: 2, 5, 8, 11."""
    matched = min(matched, layers)
    return tuple(math.ceil(number * layers / matched) - 1 for number in range(1, matched + 1))


def layers_left(config: TrimlineConfig) -> list[bool]:
    """Which layers have a head or a neuron."""
    return [heads + neurons > 0 for heads, neurons in zip(config.heads_per_layer, config.ffn_per_layer, strict=True)]


def evenly(taught: Sequence[int], left: Sequence[bool]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The teacher's layers, and the student's that learn them one for one.

    Evenly spaced ones of those taught and of those left, up to the last of both, as many as there are of the fewer. Where none is left, the last
    learns.
    """
    learners = [layer for layer, there in enumerate(left) if there] or [len(left) - 1]
    number = min(len(taught), len(learners))
    return tuple(taught[n] for n in teacher_layers(len(taught), number)), tuple(learners[n] for n in teacher_layers(len(learners), number))


class LayerDistillation(nn.Module):
    """The loss, and W [teacher width, student width], which is trained with the student.

    taught: the teacher's layers, from 0, rising. left: for rule `fixed`, which of the student's have units; they are paired by `evenly`; if they
    are fewer, fewer are taught. By the other rules m is found for each micro-batch by itself.
    kept: int64 [student width], which of the teacher's dimensions a narrower student has left; W begins as the identity on those.
    """

    def __init__(
        self, taught: Sequence[int], teacher_width: int, *, rule: LayerMapping = "ordered", left: Sequence[bool] = (), kept: Tensor | None = None
    ):
        super().__init__()
        assert left or rule != "fixed", "rule fixed goes by the layers left"
        self.rule = rule
        self.taught, self.learners = evenly(taught, left) if rule == "fixed" else (tuple(taught), ())
        kept = torch.arange(teacher_width) if kept is None else kept.cpu()
        self.transform = nn.Linear(len(kept), teacher_width)
        with torch.no_grad():
            self.transform.weight.copy_(torch.eye(teacher_width)[:, kept])
            self.transform.bias.zero_()

    def forward(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], attention_mask: Tensor, alive: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss, a scalar in fp32, and m: int64 [taught].

        teacher, student: each layer's output [B, L, width]; attention_mask [B, L]; alive: bool [layers], which of the student's layers have
        a sub-layer left, None: all.
        """
        real = attention_mask.bool()
        goals = torch.stack([teacher[layer][real] for layer in self.taught]).float()
        states = [student[layer] for layer in self.learners] or student
        made = self.transform(torch.stack([state[real] for state in states])).float()
        if self.learners:
            return F.mse_loss(made, goals) * len(goals), torch.tensor(self.learners, device=made.device)
        with torch.no_grad():
            distances = torch.stack([torch.stack([F.mse_loss(state, goal) for state in made]) for goal in goals])
        matched = match(distances, self.rule, alive)
        return F.mse_loss(made[matched], goals) * len(goals), matched


def match(distances: Tensor, rule: LayerMapping, alive: Tensor | None = None) -> Tensor:
    """m(a) of each taught layer: int64 [taught]. distances [taught, layers]; alive: bool [layers].

    free: the nearest layer. ordered: from the top down the nearest of those alive below the layer matched before; where there is none, that layer
    again. ordered_as_coded: `ordered` as in the official code, whose test for life falls on the rank in distance instead of on the layer, so that it
    may take a dead one.
    """
    layers = distances.shape[1]
    alive = torch.ones(layers, dtype=torch.bool, device=distances.device) if alive is None else alive.to(distances.device)
    if rule == "free":
        return distances.argmin(dim=1)
    found, before = [], torch.tensor(layers, device=distances.device)
    places = torch.arange(layers, device=distances.device)
    for row in distances.flip(0):
        nearest = row.argsort(stable=True)
        fit = (alive if rule == "ordered_as_coded" else alive[nearest]) & (nearest < before)
        first = torch.where(fit, places, layers).min()
        again = before.clamp(max=layers - 1)
        before = torch.where(first < layers, nearest[first.clamp(max=layers - 1)], again)
        found.append(before)
    return torch.stack(found[::-1])
