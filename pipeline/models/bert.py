"""Stock BERT and our encoder are one architecture under two sets of names: the translation, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
)

from pipeline.models.modeling_trimline import (
    TrimlineConfig,
    TrimlineForMaskedLM,
    TrimlineForQuestionAnswering,
    TrimlineForSequenceClassification,
    TrimlineModel,
    TrimlinePreTrainedModel,
)

Weights = Mapping[str, Tensor]

CLASSES: dict[type[TrimlinePreTrainedModel], type[PreTrainedModel]] = {
    TrimlineForMaskedLM: BertForMaskedLM,
    TrimlineForSequenceClassification: BertForSequenceClassification,
    TrimlineForQuestionAnswering: BertForQuestionAnswering,
    TrimlineModel: BertModel,
}
LAYER = (
    ("attention.query", "attention.self.query"),
    ("attention.key", "attention.self.key"),
    ("attention.value", "attention.self.value"),
    ("attention.output", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"),
    ("feed_forward.up", "intermediate.dense"),
    ("feed_forward.down", "output.dense"),
    ("feed_forward_norm", "output.LayerNorm"),
)
OUTSIDE = (
    ("model.embeddings.word", "bert.embeddings.word_embeddings"),
    ("model.embeddings.positions.table", "bert.embeddings.position_embeddings"),
    ("model.embeddings.types", "bert.embeddings.token_type_embeddings"),
    ("model.embeddings.norm", "bert.embeddings.LayerNorm"),
    ("model.pooler", "bert.pooler.dense"),
    ("head.dense", "cls.predictions.transform.dense"),
    ("head.norm", "cls.predictions.transform.LayerNorm"),
    ("head.decoder", "cls.predictions.decoder"),
    ("classifier", "classifier"),
    ("qa_outputs", "qa_outputs"),
)
TYPES = "embeddings.token_type_embeddings.weight"
DECODER_BIAS, VOCABULARY_BIAS = "cls.predictions.decoder.bias", "cls.predictions.bias"
"""One parameter under two names."""


def is_bert_shaped(config: TrimlineConfig) -> bool:
    """Whether stock BERT can hold the model: a post-norm encoder with absolute positions and nothing pruned away."""
    uniform = len(set(config.heads_per_layer)) == 1 and len(set(config.ffn_per_layer)) == 1
    whole = (
        uniform
        and config.full_hidden_size is None
        and config.heads_per_layer[0] * config.head_dim == config.hidden_size
        and config.ffn_per_layer[0] > 0
    )
    plain = config.activation == "gelu" and config.activation_dropout == 0 and not config.scale_embeddings
    return whole and plain and config.vocab_size > 0 and (config.kind, config.norm, config.positions) == ("encoder", "post", "absolute")


def is_ours_shaped(config: PretrainedConfig) -> bool:
    """Whether our encoder computes what this BERT does."""
    absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"
    return config.hidden_act == "gelu" and absolute and not config.is_decoder and config.tie_word_embeddings


def export(model: TrimlinePreTrainedModel) -> PreTrainedModel:
    """The same model as stock BERT, on the CPU. A model without token types gets a table of zeros for two."""
    config = model.config
    pooler = {"add_pooling_layer": model.pooler is not None} if isinstance(model, TrimlineModel) else {}
    stock = CLASSES[type(model)](
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.heads_per_layer[0],
            intermediate_size=config.ffn_per_layer[0],
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout if config.attention_dropout is None else config.attention_dropout,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size or 2,
            initializer_range=config.initializer_range,
            layer_norm_eps=config.layer_norm_eps,
            **_same(config),
        ),
        **pooler,
    )
    weights = _renamed(model.state_dict(), _names(model))
    if not config.type_vocab_size:
        weights[_types(stock)] = torch.zeros(2, config.hidden_size)
    if DECODER_BIAS in weights:
        weights[VOCABULARY_BIAS] = weights[DECODER_BIAS]
    stock.load_state_dict(weights)
    return stock


def convert(stock: PreTrainedModel) -> TrimlinePreTrainedModel:
    """Our model of a stock BERT: same outputs, same rates of dropout.

    A token type table of zeros, as `export` writes it, is dropped again.
    """
    theirs: Any = stock.config
    weights = stock.state_dict()
    weights.pop(VOCABULARY_BIAS, None)
    has_types = bool(weights[_types(stock)].any())
    if not has_types:
        del weights[_types(stock)]
    config = TrimlineConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        head_dim=theirs.hidden_size // theirs.num_attention_heads,
        heads_per_layer=[theirs.num_attention_heads] * theirs.num_hidden_layers,
        ffn_per_layer=[theirs.intermediate_size] * theirs.num_hidden_layers,
        type_vocab_size=theirs.type_vocab_size if has_types else 0,
        dropout=theirs.hidden_dropout_prob,
        attention_dropout=theirs.attention_probs_dropout_prob,
        max_position_embeddings=theirs.max_position_embeddings,
        layer_norm_eps=theirs.layer_norm_eps,
        initializer_range=theirs.initializer_range,
        **_same(theirs),
    )
    config.name_or_path = theirs.name_or_path
    model = next(ours for ours, stock_class in CLASSES.items() if type(stock) is stock_class)(config)
    model.load_state_dict(_renamed(weights, {theirs: ours for ours, theirs in _names(model).items()}))
    return model


def _same(config: PretrainedConfig) -> dict[str, Any]:
    """What the two configurations call by the same name."""
    shared = ("pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type")
    return {name: getattr(config, name) for name in shared}


def _types(stock: PreTrainedModel) -> str:
    return TYPES if isinstance(stock, BertModel) else f"bert.{TYPES}"


def _names(model: TrimlinePreTrainedModel) -> dict[str, str]:
    """Our name of every module of the model that has weights -> BERT's. A body alone is not below `model` and `bert`."""
    names = dict(OUTSIDE)
    for layer in range(model.config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"bert.encoder.layer.{layer}.{theirs}" for ours, theirs in LAYER}
    if isinstance(model, TrimlineModel):
        names = {ours.removeprefix("model."): theirs.removeprefix("bert.") for ours, theirs in names.items()}
    return names


def _renamed(weights: Weights, names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        renamed[f"{names[module]}.{leaf}"] = tensor
    return renamed
