"""From a masked model to a smaller one with the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
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


@torch.no_grad()
def compact(model: Model) -> Model:
    """A copy without the layers that have nothing left, with the same outputs (its hidden states are those of the layers that stay)."""
    smaller = copy.deepcopy(model)
    config, blocks = smaller.config, _blocks(smaller)
    stay = [layer for layer, block in enumerate(blocks) if any(_units(block))]
    smaller.base_model.layers = nn.ModuleList(blocks[layer] for layer in stay)
    for name in ("heads_per_layer", "ffn_per_layer", "heads_kept"):
        if (by_layer := getattr(config, name)) is not None:
            setattr(config, name, [by_layer[layer] for layer in stay])
    config.num_hidden_layers = len(stay)
    return smaller


@torch.no_grad()
def forget_width(model: Model) -> Model:
    """A copy of a model whose layers are alike, and whose heads together are as wide as the dimensions left, that knows no other width: what stock
    classes can hold.

    A classifier's pooler still gives the former width. Of its outputs as many stay as there are dimensions, those of largest weights in the
    classifier: the one step here that is not exact, and is for recovery to mend. Positions must be absolute, as all others know the heads there were.
    """
    same = copy.deepcopy(model)
    config, pooler = same.config, same.base_model.pooler
    assert {heads * config.head_dim for heads in config.heads_per_layer} == {config.hidden_size}, "heads and dimensions are of two widths"
    assert config.positions == "absolute"
    if isinstance(pooler, nn.Linear):
        classifier: Any = same.classifier
        kept = torch.zeros(pooler.out_features, dtype=torch.bool)
        kept[classifier.weight.norm(dim=0).topk(config.hidden_size).indices.cpu()] = True
        same.base_model.pooler, same.classifier = _outputs(pooler, kept), _inputs(classifier, kept)
    for block in _blocks(same):
        block.attention.kept = list(range(_units(block)[0]))
    config.full_hidden_size, config.heads_kept = None, None
    return same


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
