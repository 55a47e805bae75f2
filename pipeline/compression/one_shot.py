"""Pruning in one shot: units are ranked by what the loss loses without them, to first order, and the best are kept.

The importance of a unit is the sum over rows x of |dL(x)/dz|, z its mask at 1 (Michel et al. 2019, section 4; Molchanov et al. 2017), over the square
root of its layer's length. Over the whole length, as there, every layer is worth the same, and about as many units of each are left; as they are,
upper layers, of smaller gradients, keep next to none. Halfway, layers are left much as trained masks leave them, the lower ones wider. Where layers
have an importance of their own, which multiplies that of their units, those are over the whole length.

Heads and neurons have budgets of their own: a head is worth more than any neuron but costs dozens of times as much, so that one ranking of all by
importance per parameter would delete every head, or every neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.compression.shapes import highest, round_up
from pipeline.compression.sparsity import FINE, Prunable, Removed, within_layers
from pipeline.errors import UserError
from pipeline.models.modeling_trimline import Masks, TrimlinePreTrainedModel
from pipeline.objectives.base import Batch


def importance(
    model: TrimlinePreTrainedModel,
    batches: Iterable[Batch],
    loss_of: Callable[[Masks, Batch], Tensor],
    *,
    units: Sequence[str] = ("heads", "neurons"),
) -> dict[str, Tensor]:
    """How much each unit matters: fp64, of `Prunable.shapes`, 0 or more. Units of a kind compare, over all layers.

    loss_of: the sum (not the mean) over a batch's rows of the loss of `model` with these masks; of labels, since what tells it from the teacher
    is flat at the teacher. Every row's gradient has its own absolute value, so that batches may cut the data in any way. The model is left as it
    was, without gradients.
    """
    shapes = Prunable.of(model.config).shapes
    sums = {unit: torch.zeros(shapes[unit], dtype=torch.float64, device=model.device) for unit in units}
    with _evaluated(model):
        for batch in batches:
            rows = len(batch["input_ids"])
            masks = {unit: torch.ones(_by_row(unit, shapes[unit], rows), device=model.device, requires_grad=True) for unit in units}
            gradients = torch.autograd.grad(loss_of(masks, batch), list(masks.values()))
            for unit, gradient in zip(units, gradients, strict=True):
                sums[unit] += gradient.double().abs().sum(0 if unit == "hidden" else 1).view(shapes[unit])
    found = {unit: F.normalize(summed, dim=-1) for unit, summed in sums.items()}
    weighed = {fine for layer, fine in FINE.items() if fine in units and layer not in units}
    return found | {unit: found[unit] * sums[unit].norm(dim=-1, keepdim=True).sqrt() for unit in weighed}


def choose(
    importance: Mapping[str, Tensor],
    removed: Removed,
    target: float,
    *,
    head_share: float = 0.5,
    multiple: int = 1,
    head_dim: int = 1,
) -> dict[str, Tensor]:
    """Masks of zeros and ones, `heads` and `neurons`, that remove `target`, or the least that is more.

    head_share: of what is kept, the heads'; they get no more than there are of them, and neurons have the rest. Of an encoder with four neurons a
    dimension heads are a third, so that equal shares keep twice as large a part of the heads as of the neurons. Unless it is 0 or 1, a head
    and a neuron stay at least.
    importance: of heads and neurons; where `attention` or `feedforward` is there too, its layers' units are worth as many times as much.
    multiple, head_dim: see `shapes.round_up`.
    Raises UserError for a target that leaves no room.
    """
    scores = within_layers(importance)

    def kept(heads: int, neurons: int) -> dict[str, Tensor]:
        best = {unit: highest(scores[unit].flatten(), count).view(scores[unit].shape) for unit, count in (("heads", heads), ("neurons", neurons))}
        return round_up(best, importance, multiple, head_dim)

    def share(heads: int, neurons: int) -> float:
        return 1 - removed(kept(heads, neurons)).item()

    budget = 1 - target + 1e-6  # of fp32
    least_heads, least_neurons = int(head_share > 0), int(head_share < 1)
    most_heads, most_neurons = least_heads * scores["heads"].numel(), least_neurons * scores["neurons"].numel()
    if (least := share(least_heads, least_neurons)) > budget:
        raise UserError(
            f"prune: to remove {target:.4g} is more than can be: the smallest that works keeps {least:.2g} (a head, a neuron, rounded up as asked);"
            " lower the target"
        )
    heads = _largest(least_heads, most_heads, lambda n: share(n, 0) <= head_share * budget and share(n, least_neurons) <= budget)
    neurons = _largest(least_neurons, most_neurons, lambda n: share(heads, n) <= budget)
    heads = _largest(heads, most_heads, lambda n: share(n, neurons) <= budget)  # what neurons, once all are kept, leave over
    return kept(heads, neurons)


def _largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, where all numbers below one that fits do too; at least `least`."""
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _by_row(unit: str, shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The shape of a mask that differs by row, as `modeling_trimline.Masks` has it."""
    if unit == "hidden":
        return (rows, 1, *shape)
    layers, *width = shape
    return (layers, rows, *width) if unit == "heads" else (layers, rows, 1, *(width or [1]))


@contextmanager
def _evaluated(model: TrimlinePreTrainedModel) -> Iterator[None]:
    """Without dropout, without gradients of parameters, and with padding, so that masks by row fit."""
    training, unpadded = model.training, model.config.unpadded
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    model.config.unpadded = False
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        model.config.unpadded = unpadded
        for parameter in learned:
            parameter.requires_grad_(True)
