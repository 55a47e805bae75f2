"""Stock BERT, stock RoBERTa and our encoder are one architecture under three sets of names: the translation, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaModel,
)

from pipeline.models.modeling_trimline import (
    ACTIVATIONS,
    TrimlineConfig,
    TrimlineForMaskedLM,
    TrimlineForQuestionAnswering,
    TrimlineForSequenceClassification,
    TrimlineModel,
    TrimlinePreTrainedModel,
)

Weights = Mapping[str, Tensor]
Ours = type[TrimlinePreTrainedModel]

BODY = (
    ("model.embeddings.word", "embeddings.word_embeddings"),
    ("model.embeddings.positions.table", "embeddings.position_embeddings"),
    ("model.embeddings.types", "embeddings.token_type_embeddings"),
    ("model.embeddings.norm", "embeddings.LayerNorm"),
    ("model.pooler", "pooler.dense"),
)
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
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"


@dataclass(frozen=True)
class Family:
    """How one of Hugging Face's encoders names what ours has.

    prefix: of the body's weights. classes: ours -> its. heads: our name of a head's module -> its. biases: the output bias, one parameter under
    two names, of which the first is ours. types: rows of the table of token types of a model without them. activations: those that our masked
    language model's head has too.
    """

    prefix: str
    config: type[Any]
    classes: Mapping[Ours, type[PreTrainedModel]]
    heads: Mapping[Ours, Mapping[str, str]]
    biases: tuple[str, str]
    types: int
    activations: tuple[str, ...]

    def names(self, model: TrimlinePreTrainedModel) -> dict[str, str]:
        """Our name of every module of the model that has weights -> its. A body alone is not below `model` and the prefix."""
        names = {ours: f"{self.prefix}.{theirs}" for ours, theirs in BODY}
        for layer in range(model.config.num_hidden_layers):
            names |= {f"model.layers.{layer}.{ours}": f"{self.prefix}.encoder.layer.{layer}.{theirs}" for ours, theirs in LAYER}
        if isinstance(model, TrimlineModel):
            return {ours.removeprefix("model."): theirs.removeprefix(f"{self.prefix}.") for ours, theirs in names.items()}
        return names | dict(self.heads[type(model)])

    def reserved(self, config: Any) -> int:
        """Rows of its position table before the first position: RoBERTa's positions begin after the number of the padding token."""
        return 0 if self is BERT else config.pad_token_id + 1


BERT = Family(
    prefix="bert",
    config=BertConfig,
    classes={
        TrimlineForMaskedLM: BertForMaskedLM,
        TrimlineForSequenceClassification: BertForSequenceClassification,
        TrimlineForQuestionAnswering: BertForQuestionAnswering,
        TrimlineModel: BertModel,
    },
    heads={
        TrimlineForMaskedLM: {
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head.decoder": "cls.predictions.decoder",
        },
        TrimlineForSequenceClassification: {"classifier": "classifier"},
        TrimlineForQuestionAnswering: {"qa_outputs": "qa_outputs"},
    },
    biases=("cls.predictions.decoder.bias", "cls.predictions.bias"),
    types=2,
    activations=tuple(ACTIVATIONS),
)
ROBERTA = Family(
    prefix="roberta",
    config=RobertaConfig,
    classes={
        TrimlineForMaskedLM: RobertaForMaskedLM,
        TrimlineForSequenceClassification: RobertaForSequenceClassification,
        TrimlineForQuestionAnswering: RobertaForQuestionAnswering,
        TrimlineModel: RobertaModel,
    },
    heads={
        TrimlineForMaskedLM: {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head.decoder": "lm_head.decoder"},
        # Its classifier has no pooler but a dense layer and tanh of its own: the same, but for a dropout before them.
        TrimlineForSequenceClassification: {"model.pooler": "classifier.dense", "classifier": "classifier.out_proj"},
        TrimlineForQuestionAnswering: {"qa_outputs": "qa_outputs"},
    },
    biases=("lm_head.decoder.bias", "lm_head.bias"),
    types=1,
    activations=("gelu",),
)
FAMILIES = {"bert": BERT, "roberta": ROBERTA}
"""By model_type, which is also our configuration's `family`."""


def is_stock_shaped(config: TrimlineConfig) -> bool:
    """Whether a stock class can hold the model: a post-norm encoder with absolute positions and nothing pruned away."""
    uniform = len(set(config.heads_per_layer)) == 1 and len(set(config.ffn_per_layer)) == 1
    whole = (
        uniform
        and config.full_hidden_size is None
        and config.heads_per_layer[0] * config.head_dim == config.hidden_size
        and config.ffn_per_layer[0] > 0
    )
    plain = config.activation in FAMILIES[config.family].activations and config.activation_dropout == 0 and not config.scale_embeddings
    return whole and plain and config.vocab_size > 0 and (config.kind, config.norm, config.positions) == ("encoder", "post", "absolute")


def unlike(config: PretrainedConfig) -> str | None:
    """Why our encoder does not compute what a Hugging Face model of this configuration does; None where it does."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"a model of type {config.model_type!r} is neither a BERT nor a RoBERTa"
    if config.hidden_act not in family.activations:
        return f"its hidden_act is {config.hidden_act!r}; of a model of type {config.model_type!r} Trimline takes {', '.join(family.activations)}"
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return f"its position_embedding_type is {config.position_embedding_type!r}, not 'absolute'"
    if config.is_decoder:
        return "it is a decoder (is_decoder)"
    if not config.tie_word_embeddings:
        return "its output matrix is not its token embedding (tie_word_embeddings)"
    if family is ROBERTA and config.pad_token_id is None:
        return "its pad_token_id is null, from which positions are counted"
    return None


def export(model: TrimlinePreTrainedModel) -> PreTrainedModel:
    """The same model under the stock class of its family, on the CPU. A model without token types gets a table of zeros."""
    config = model.config
    family = FAMILIES[config.family]
    pooler = {"add_pooling_layer": model.pooler is not None} if isinstance(model, TrimlineModel) else {}
    reserved = family.reserved(config)
    stock = family.classes[type(model)](
        family.config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.heads_per_layer[0],
            intermediate_size=config.ffn_per_layer[0],
            hidden_act=config.activation,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout if config.attention_dropout is None else config.attention_dropout,
            max_position_embeddings=config.max_position_embeddings + reserved,
            type_vocab_size=config.type_vocab_size or family.types,
            initializer_range=config.initializer_range,
            layer_norm_eps=config.layer_norm_eps,
            **_same(config),
        ),
        **pooler,
    )
    weights = _renamed(model.state_dict(), family.names(model))
    positions, types = (_in_body(stock, family, name) for name in (POSITIONS, TYPES))
    weights[positions] = torch.cat([weights[positions].new_zeros(reserved, config.hidden_size), weights[positions]])
    if not config.type_vocab_size:
        weights[types] = torch.zeros(family.types, config.hidden_size)
    ours, theirs = family.biases
    if ours in weights:
        weights[theirs] = weights[ours]
    stock.load_state_dict(weights)
    return stock


def convert(stock: PreTrainedModel) -> TrimlinePreTrainedModel:
    """Our model of a stock one that is not `unlike`: same outputs at the tokens of rows padded on the right, same rates of dropout but in heads.

    A token type table of one row, which is a constant, goes into the positions; one of zeros, as `export` writes it, is dropped.
    """
    theirs: Any = stock.config
    family = FAMILIES[theirs.model_type]
    weights = {name: tensor.float() for name, tensor in stock.state_dict().items()}
    weights.pop(family.biases[1], None)
    positions, types = (_in_body(stock, family, name) for name in (POSITIONS, TYPES))
    weights[positions] = weights[positions][family.reserved(theirs) :]
    if theirs.type_vocab_size == 1:
        weights[positions] = weights[positions] + weights[types]
    has_types = theirs.type_vocab_size > 1 and bool(weights[types].any())
    if not has_types:
        del weights[types]
    config = TrimlineConfig(
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.hidden_size,
        head_dim=theirs.hidden_size // theirs.num_attention_heads,
        heads_per_layer=[theirs.num_attention_heads] * theirs.num_hidden_layers,
        ffn_per_layer=[theirs.intermediate_size] * theirs.num_hidden_layers,
        family=theirs.model_type,
        type_vocab_size=theirs.type_vocab_size if has_types else 0,
        activation=theirs.hidden_act,
        dropout=theirs.hidden_dropout_prob,
        attention_dropout=theirs.attention_probs_dropout_prob,
        max_position_embeddings=len(weights[positions]),
        layer_norm_eps=theirs.layer_norm_eps,
        initializer_range=theirs.initializer_range,
        **_same(theirs),
    )
    config.name_or_path = theirs.name_or_path
    model = next(ours for ours, stock_class in family.classes.items() if type(stock) is stock_class)(config)
    model.load_state_dict(_renamed(weights, {theirs: ours for ours, theirs in family.names(model).items()}))
    return model


def _same(config: PretrainedConfig) -> dict[str, Any]:
    """What the two configurations call by the same name."""
    shared = ("pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type")
    return {name: getattr(config, name) for name in shared}


def _in_body(stock: PreTrainedModel, family: Family, name: str) -> str:
    return name if type(stock) is family.classes[TrimlineModel] else f"{family.prefix}.{name}"


def _renamed(weights: Weights, names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        module, _, leaf = name.rpartition(".")
        renamed[f"{names[module]}.{leaf}"] = tensor
    return renamed
