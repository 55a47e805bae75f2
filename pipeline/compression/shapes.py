"""Masks of given sizes: the same in every layer, or multiples of what a device computes at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.compression.sparsity import Prunable
from pipeline.errors import UserError


@dataclass(frozen=True)
class Shape:
    """What is to be left of an encoder: so many layers, each of as many heads and feed-forward neurons, on a residual stream of `hidden` dimensions.

    The width of a head stays. Stock classes have no width of a head of their own: it is hidden / heads. So they hold the shape where heads *
    head_dim = hidden: either all heads and dimensions stay, or as large a part of the one as of the other. Other shapes are uniform but ours.
    """

    layers: int
    heads: int
    ffn: int
    hidden: int

    def check(self, prunable: Prunable) -> None:
        """Raises UserError where the encoder has less than is to be left of it."""
        wrong = [
            f"{name} is {wanted}, the model has {there}"
            for name, there in vars(prunable).items()
            if not 1 <= (wanted := getattr(self, name)) <= there
        ]
        if wrong:
            raise UserError(f"prune: the target shape's {'; '.join(wrong)}; give what is to be left, at least 1")

    def is_stock(self, prunable: Prunable) -> bool:
        """Whether stock BERT or RoBERTa can have the shape."""
        return self.heads * (prunable.hidden // prunable.heads) == self.hidden


def to_shape(scores: Mapping[str, Tensor], shape: Shape, prunable: Prunable) -> dict[str, Tensor]:
    """The masks, of zeros and ones, that leave the units of highest score in this shape: `heads`, `neurons`, and `hidden` where dimensions go.

    scores: by unit, of `Prunable.shapes`: log alpha, or importance. Heads and neurons are ranked in their layer. Layers are ranked by `attention` and
    by `feedforward`, and the best by the sum of both ranks stay, of equal ones the lower.
    Raises UserError for a shape that the model does not have, or that asks for units without scores.
    """
    shape.check(prunable)
    lacking = [unit for unit, wanted, there in _wanted(shape, prunable) if wanted < there and not scores.keys() & unit]
    if lacking:
        names = ", ".join(" or ".join(sorted(unit)) for unit in lacking)
        raise UserError(f"prune: the target shape is smaller than the model in what nothing is known of; add {names} to the units that are pruned")
    device = next((score.device for score in scores.values()), None)
    known = {unit: torch.zeros(size, device=device) for unit, size in prunable.shapes.items()} | dict(scores)
    ranks = [known[unit].argsort(stable=True).argsort() for unit in ("attention", "feedforward") if unit in scores]
    layers = highest(sum(ranks, torch.zeros(prunable.layers, device=device)), shape.layers)[:, None]
    masks = {"heads": highest(known["heads"], shape.heads) * layers, "neurons": highest(known["neurons"], shape.ffn) * layers}
    return masks | ({"hidden": highest(known["hidden"], shape.hidden)} if shape.hidden < prunable.hidden else {})


def round_up(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], multiple: int, head_dim: int) -> dict[str, Tensor]:
    """The masks with so many more units kept that widths are multiples, of 8 or 64 as tensor cores like them; of a layer, or of the dimensions.

    The width of attention is its heads' together: with a head_dim of 32 and a multiple of 64 heads stay by twos, with one of 64 as they were.
    Removed layers stay removed, and no width grows beyond the model's. What comes back are the units of highest score, with the smallest value that
    is kept beside them. Masks on whole layers are as they were.
    """
    wanted = steps(multiple, head_dim)
    return {unit: _rounded(mask, scores[unit], wanted[unit]) if wanted.get(unit, 1) > 1 else mask for unit, mask in masks.items()}


def steps(multiple: int, head_dim: int) -> dict[str, int]:
    """By unit, what the number of those kept is a multiple of where widths are multiples."""
    return {"heads": multiple // math.gcd(multiple, head_dim), "neurons": multiple, "hidden": multiple}


def highest(scores: Tensor, count: int) -> Tensor:
    """fp32 ones at the `count` highest scores along the last dimension, the first of equal ones, else zeros."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros(scores.shape, device=scores.device).scatter(-1, order[..., :count], 1.0)


def _wanted(shape: Shape, prunable: Prunable) -> list[tuple[frozenset[str], int, int]]:
    """Units any of which decides, how many are wanted, how many there are."""
    return [
        (frozenset({"attention", "feedforward"}), shape.layers, prunable.layers),
        (frozenset({"heads"}), shape.heads, prunable.heads),
        (frozenset({"neurons"}), shape.ffn, prunable.ffn),
        (frozenset({"hidden"}), shape.hidden, prunable.hidden),
    ]


def _rounded(mask: Tensor, scores: Tensor, step: int) -> Tensor:
    kept = mask != 0
    count = kept.sum(-1, keepdim=True)
    wanted = (count + step - 1) // step * step
    order = torch.where(kept, math.inf, scores).argsort(dim=-1, descending=True, stable=True)
    smallest = torch.where(kept, mask, math.inf).amin(-1, keepdim=True)
    grown = (order.argsort(dim=-1) < wanted) & ~kept
    return torch.where(grown, smallest, mask)
