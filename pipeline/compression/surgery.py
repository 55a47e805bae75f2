"""From a masked model to a smaller one with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn

from pipeline.models.modeling_trimline import TrimlinePreTrainedModel
from pipeline.models.positions import attention_heads

Model = TypeVar("Model", bound=TrimlinePreTrainedModel)


@torch.no_grad()
def remove(model: Model, masks: Mapping[str, Tensor]) -> Model:
    """A copy of a Trimline model without the units whose mask is 0; the values of the others are folded into the weights.

    masks: `heads` [layers, heads], `neurons` [layers, ffn], either may be absent; as for the model's `forward`, to which the copy's is equal
    up to rounding. A sub-layer that loses every unit goes with its LayerNorm.
    """
    removed = copy.deepcopy(model)
    for layer, block in enumerate(_blocks(removed)):
        if block.attention is not None and "heads" in masks:
            width = block.attention.query.out_features // block.attention.head_dim
            mask = masks["heads"][layer, :width].to(block.attention.query.weight)
            if not mask.any():
                block.attention = block.attention_norm = None
            else:
                block.attention.kept = [head for head, value in zip(block.attention.kept, mask, strict=True) if value != 0]
                mask = mask.repeat_interleave(block.attention.head_dim)
                for name in ("query", "key", "value"):
                    setattr(block.attention, name, _rows(getattr(block.attention, name), mask))
                block.attention.output = _columns(block.attention.output, mask)
        if block.feed_forward is not None and "neurons" in masks:
            mask = masks["neurons"][layer, : block.feed_forward.up.out_features].to(block.feed_forward.up.weight)
            if not mask.any():
                block.feed_forward = block.feed_forward_norm = None
            else:
                block.feed_forward.up, block.feed_forward.down = _rows(block.feed_forward.up, mask), _columns(block.feed_forward.down, mask)
    left = [_units(block) for block in _blocks(removed)]
    removed.config.heads_per_layer, removed.config.ffn_per_layer = [heads for heads, _ in left], [neurons for _, neurons in left]
    every = list(range(attention_heads(removed.config)))
    heads_kept = [block.attention.kept if block.attention is not None else None for block in _blocks(removed)]
    removed.config.heads_kept = [None if kept == every else kept for kept in heads_kept]
    return removed


def structure(model: TrimlinePreTrainedModel, dense: TrimlinePreTrainedModel) -> list[dict[str, int]]:
    """What is left of each layer of `dense` in the pruned `model`, from the bottom."""
    pairs = zip(_blocks(model), _blocks(dense), strict=True)
    return [
        {"layer": number, "heads": heads, "of_heads": of_heads, "neurons": neurons, "of_neurons": of_neurons}
        for number, ((heads, neurons), (of_heads, of_neurons)) in enumerate(((_units(a), _units(b)) for a, b in pairs), start=1)
    ]


def table(structure: list[dict[str, Any]]) -> Table:
    """A structure for the terminal, the top layer first."""
    shown = Table("layer", "heads", "neurons", title="What is left of the encoder")
    for row in reversed(structure):
        shown.add_row(str(row["layer"]), f"{row['heads']} of {row['of_heads']}", f"{row['neurons']} of {row['of_neurons']}")
    return shown


def _blocks(model: TrimlinePreTrainedModel) -> list[Any]:
    return list(model.base_model.layers)  # type: ignore[arg-type]


def _units(block: Any) -> tuple[int, int]:
    heads = block.attention.query.out_features // block.attention.head_dim if block.attention is not None else 0
    return heads, block.feed_forward.up.out_features if block.feed_forward is not None else 0


def _rows(linear: nn.Linear, mask: Tensor) -> nn.Linear:
    """Without the outputs whose mask is 0."""
    kept = mask != 0
    return _linear(linear.weight[kept], linear.bias[kept])


def _columns(linear: nn.Linear, mask: Tensor) -> nn.Linear:
    """Without the inputs whose mask is 0, the others scaled by it."""
    kept = mask != 0
    return _linear(linear.weight[:, kept] * mask[kept], linear.bias)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear
