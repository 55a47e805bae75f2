"""From a masked model to a smaller one with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.modeling_trimline import (
    Norm,
    TrimlineConfig,
    TrimlineForCausalLM,
    TrimlineForMaskedLM,
    TrimlineForQuestionAnswering,
    TrimlinePreTrainedModel,
)
from pipeline.models.positions import AbsolutePositions, attention_heads, full_width

Model = TypeVar("Model", bound=TrimlinePreTrainedModel)


@torch.no_grad()
def remove(model: Model, masks: Mapping[str, Tensor]) -> Model:
    """A copy of a Trimline model without the units whose mask is 0; the values of the others are folded into the weights.

    masks: any of `modeling_trimline.Masks`; as for the model's `forward`, to which the copy's is equal up to rounding. A sub-layer that loses every
    unit goes with its LayerNorm.
    Raises UserError for a mask on dimensions that the model cannot lose.
    """
    removed = copy.deepcopy(model)
    for layer, block in enumerate(_blocks(removed)):
        if block.attention is not None:
            _remove_heads(block, _row(masks, "heads", layer), _row(masks, "attention", layer))
        if block.feed_forward is not None:
            _remove_neurons(block, _row(masks, "neurons", layer), _row(masks, "feedforward", layer))
    if "hidden" in masks:
        _remove_dimensions(removed, masks["hidden"])
    left = [_units(block) for block in _blocks(removed)]
    removed.config.heads_per_layer, removed.config.ffn_per_layer = [heads for heads, _ in left], [neurons for _, neurons in left]
    every = list(range(attention_heads(removed.config)))
    heads_kept = [block.attention.kept if block.attention is not None else None for block in _blocks(removed)]
    removed.config.heads_kept = [None if kept == every else kept for kept in heads_kept]
    return removed


def check_dimensions(config: TrimlineConfig) -> None:
    """Raises UserError for a model whose residual stream cannot lose dimensions."""
    why = None
    if config.positions == "sinusoidal":
        why = "sinusoidal positions are a function of the width"
    elif config.adaptive is not None:
        why = "adaptive embeddings have several widths"
    elif config.kind == "decoder" and not (config.norm == "pre" and config.final_norm):
        why = "its last LayerNorm is inside a layer, and the output matrix is the token embedding"
    if why is not None:
        raise UserError(f"{config.name_or_path}: no dimensions of this model can be pruned: {why}; leave `hidden` out of sparsity.units")


def _remove_heads(block: Any, mask: Tensor | None, layer: Tensor | None) -> None:
    attention = block.attention
    if not _alive(mask, layer):
        block.attention = block.attention_norm = None
        return
    if mask is not None:
        mask = mask[: len(attention.kept)].to(attention.output.weight)
        attention.kept = [head for head, value in zip(attention.kept, mask, strict=True) if value != 0]
        mask = mask.repeat_interleave(attention.head_dim)
        for name in ("query", "key", "value"):
            setattr(attention, name, _outputs(getattr(attention, name), mask != 0))
        attention.output = _inputs(attention.output, mask != 0, mask)
    if layer is not None:
        _scale(attention.output, layer)


def _remove_neurons(block: Any, mask: Tensor | None, layer: Tensor | None) -> None:
    feed_forward = block.feed_forward
    if not _alive(mask, layer):
        block.feed_forward = block.feed_forward_norm = None
        return
    if mask is not None:
        mask = mask[: feed_forward.up.out_features].to(feed_forward.up.weight)
        feed_forward.up, feed_forward.down = _outputs(feed_forward.up, mask != 0), _inputs(feed_forward.down, mask != 0, mask)
    if layer is not None:
        _scale(feed_forward.down, layer)


def _remove_dimensions(model: Any, mask: Tensor) -> None:
    """What writes to the residual stream is scaled, what reads it is not; a tied output matrix brings the scale of the embedding it is."""
    check_dimensions(model.config)
    body = model.base_model
    embeddings, mask = body.embeddings, mask.to(body.embeddings.word.weight)
    kept = mask != 0
    embeddings.word = _table(embeddings.word, mask)
    if isinstance(embeddings.positions, AbsolutePositions):
        embeddings.positions.table = _table(embeddings.positions.table, mask)
    if embeddings.types is not None:
        embeddings.types = _table(embeddings.types, mask)
    embeddings.norm = _norm(embeddings.norm, kept, mask)
    for block in _blocks(model):
        block.attention_norm, block.feed_forward_norm = (_norm(norm, kept, mask) for norm in (block.attention_norm, block.feed_forward_norm))
        if block.attention is not None:
            for name in ("query", "key", "value"):
                setattr(block.attention, name, _inputs(getattr(block.attention, name), kept))
            block.attention.output = _outputs(block.attention.output, kept, mask)
        if block.feed_forward is not None:
            block.feed_forward.up, block.feed_forward.down = _inputs(block.feed_forward.up, kept), _outputs(block.feed_forward.down, kept, mask)
    body.norm = _norm(body.norm, kept, torch.ones_like(mask) if isinstance(model, TrimlineForCausalLM) else mask)
    if body.pooler is not None:
        body.pooler = _inputs(body.pooler, kept)
    if isinstance(model, TrimlineForQuestionAnswering):
        model.qa_outputs = _inputs(model.qa_outputs, kept)
    if isinstance(model, TrimlineForMaskedLM):
        model.head.dense, model.head.norm = _inputs(_outputs(model.head.dense, kept), kept), _norm(model.head.norm, kept, torch.ones_like(mask))
        model.head.decoder.in_features, model.head.decoder.weight = len(embeddings.word.weight.T), embeddings.word.weight
    if isinstance(model, TrimlineForCausalLM):
        model.head.in_features, model.head.weight = len(embeddings.word.weight.T), embeddings.word.weight
    model.config.full_hidden_size, model.config.hidden_size = full_width(model.config), int(kept.sum())


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


def _row(masks: Mapping[str, Tensor], unit: str, layer: int) -> Tensor | None:
    return masks[unit][layer] if unit in masks else None


def _alive(units: Tensor | None, layer: Tensor | None) -> bool:
    return all(mask is None or bool((mask != 0).any()) for mask in (units, layer))


def _outputs(linear: nn.Linear, kept: Tensor, scale: Tensor | None = None) -> nn.Linear:
    """Without the outputs that are not kept, the others times their scale."""
    weight, bias = linear.weight[kept], linear.bias[kept]
    return _linear(weight, bias) if scale is None else _linear(weight * scale[kept, None], bias * scale[kept])


def _inputs(linear: nn.Linear, kept: Tensor, scale: Tensor | None = None) -> nn.Linear:
    """Without the inputs that are not kept, the others times their scale."""
    weight = linear.weight[:, kept]
    return _linear(weight if scale is None else weight * scale[kept], linear.bias)


def _scale(linear: nn.Linear, factor: Tensor) -> None:
    linear.weight.mul_(factor.to(linear.weight))
    linear.bias.mul_(factor.to(linear.bias))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear


def _table(table: nn.Embedding, mask: Tensor) -> nn.Embedding:
    weight = table.weight[:, mask != 0] * mask[mask != 0]
    return nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=table.padding_idx, _weight=weight)


def _norm(norm: Norm | None, kept: Tensor, scale: Tensor) -> Any:
    if norm is None:
        return None
    smaller = Norm(int(kept.sum()), norm.eps)
    smaller.weight, smaller.bias = (nn.Parameter(side[kept] * scale[kept]) for side in (norm.weight, norm.bias))
    return smaller
