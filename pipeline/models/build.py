"""A model by its settings, or out of a directory: Trimline's, stock BERT's and RoBERTa's, or any of Hugging Face's."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pipeline.errors import UserError
from pipeline.models import stock
from pipeline.models.modeling_trimline import (
    TrimlineConfig,
    TrimlineForCausalLM,
    TrimlineForMaskedLM,
    TrimlineForQuestionAnswering,
    TrimlineForSequenceClassification,
    TrimlineModel,
    TrimlinePreTrainedModel,
)
from pipeline.models.positions import SCHEMES
from pipeline.models.quiet import quiet
from pipeline.models.settings import ModelSettings

Head = Literal["mlm", "causal", "classification", "qa", "none"]

OURS: dict[str, Any] = {
    "mlm": TrimlineForMaskedLM,
    "causal": TrimlineForCausalLM,
    "classification": TrimlineForSequenceClassification,
    "qa": TrimlineForQuestionAnswering,
    "none": TrimlineModel,
}
ANY: dict[str, Any] = {
    "mlm": AutoModelForMaskedLM,
    "causal": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
    "qa": AutoModelForQuestionAnswering,
    "none": AutoModel,
}


def new(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, head: Head | None = None) -> PreTrainedModel:
    """A model with random weights, its vocabulary and special tokens those of the tokenizer.

    head: default mlm for an encoder, causal for a decoder; none: the body alone. Weights are drawn from torch's global generator.
    Raises UserError when `adaptive.cutoffs` reach beyond the vocabulary.
    """
    adaptive = settings.adaptive
    if adaptive is not None and adaptive.cutoffs and adaptive.cutoffs[-1] >= len(tokenizer):
        raise UserError(
            f"model.adaptive.cutoffs: {adaptive.cutoffs[-1]} is beyond the vocabulary, which has {len(tokenizer)} tokens; "
            "leave out the cutoffs that are, or give the tokenizer more text"
        )
    config = TrimlineConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        head_dim=settings.hidden // settings.heads,
        heads_per_layer=[settings.heads] * settings.layers,
        ffn_per_layer=[settings.ffn] * settings.layers,
        kind=settings.kind,
        norm=settings.norm,
        positions=settings.positions,
        untie_cls=settings.untie_cls,
        activation=settings.activation,
        dropout=settings.dropout,
        attention_dropout=settings.attention_dropout,
        activation_dropout=settings.activation_dropout,
        final_norm=settings.final_norm,
        scale_embeddings=settings.scale_embeddings,
        unpadded=settings.unpadded,
        adaptive=adaptive.model_dump(mode="json") if adaptive is not None else None,
        max_position_embeddings=settings.max_length,
        initializer_range=settings.init_std,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return OURS[head or ("mlm" if settings.kind == "encoder" else "causal")](config)


def load(
    directory: str | Path, head: Head = "mlm", labels: Sequence[str] | None = None, regression: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a directory, in fp32 on the CPU, under the head asked for; a head the directory lacks is drawn at random.

    Trimline's directories, stock BERT's and RoBERTa's become our classes, which take `masks`; others (`stock.unlike`) stay Hugging Face's own.
    labels: names of the classes; regression: one number instead. Neither: as the directory says.
    Raises UserError where there is no such model or it cannot have that head, for weights that are not plain tensors, and for
    code in the directory unless trust_remote_code.
    """
    path = Path(directory)
    kind = _model_type(path, trust_remote_code)
    try:
        with quiet():
            trust: dict[str, Any] = {} if kind == "trimline" else {"trust_remote_code": trust_remote_code}
            config: Any = (TrimlineConfig if kind == "trimline" else AutoConfig).from_pretrained(path, **trust)
            _check_head(path, config, head)
            if head == "classification":
                _set_labels(path, config, labels, regression)
            if head == "qa":
                config.num_labels = 2  # what Hugging Face's classes call start and end; a classifier's directory may say otherwise
            becomes_ours = kind != "trimline" and stock.unlike(config) is None
            stock_class: Any = stock.FAMILIES[kind].classes[OURS[head]] if becomes_ours else ANY[head]
            model_class = OURS[head] if kind == "trimline" else stock_class
            model, report = model_class.from_pretrained(path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **trust)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: the weights are a pickle that holds more than tensors, not run; take a copy of the model in safetensors") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be loaded as a model for {head}: {reason[:300]}") from error
    _check_complete(path, model, report)
    return stock.convert(model) if becomes_ours else model.float()


def adopt(model: PreTrainedModel, settings: ModelSettings) -> None:
    """Bring a loaded model, whose shape is its own, to what a recipe may still say of it: `unpadded`.

    Raises UserError where the recipe names positions that the model does not have, or `unpadded` for a model that is not ours.
    """
    ours = isinstance(model, TrimlinePreTrainedModel)
    found = model.config.positions if ours else "absolute"
    if "positions" in settings.model_fields_set and settings.positions != found:
        own = f"positions {found}" if ours else "positions of its own"
        raise UserError(
            f"{model.config.name_or_path}: the recipe sets model.positions: {settings.positions}, the checkpoint has {own}; "
            "leave model.positions out, or train a new model without model.from"
        )
    if settings.unpadded and not ours:
        raise UserError(f"{model.config.name_or_path}: model.unpadded is for Trimline's own models, BERT and RoBERTa; leave it out")
    if ours:
        model.config.unpadded = settings.unpadded


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, document_mask: bool = False) -> None:
    """Raises UserError when a loaded model knows fewer tokens than the tokenizer makes, or fewer positions than rows are long,
    or cannot keep attention inside documents where it should (`document_mask`).
    """
    config = model.config
    if document_mask and not isinstance(model, TrimlinePreTrainedModel):
        raise UserError(
            f"{config.name_or_path}: a model of type {config.model_type!r} cannot keep attention inside documents; "
            "Trimline's own, BERT and RoBERTa can: set pretrain.document_mask: false, or start from one of those"
        )
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{config.name_or_path}: the model knows {config.vocab_size} tokens, the tokenizer makes {len(tokenizer)}; "
            "set tokenize.tokenizer to the model's own tokenizer directory"
        )
    ours_without_end = isinstance(model, TrimlinePreTrainedModel) and not SCHEMES[config.positions].bounded
    positions = None if ours_without_end else getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(f"{config.name_or_path}: the model takes {positions} tokens, rows have {length}; lower the length of the rows to that")


def _model_type(path: Path, trust_remote_code: bool) -> str:
    """What config.json says the model is, once it is known to need no code that we may not run."""
    if not path.is_dir():
        raise UserError(f"{path}: no such model directory; give one that save_pretrained wrote")
    try:
        written = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = written.get("model_type", "")
    except FileNotFoundError:
        raise UserError(f"{path}: not a model directory, it has no config.json; give one that save_pretrained wrote") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path / 'config.json'}: not a readable model configuration: {error}") from None
    if kind == "trimline" or kind in CONFIG_MAPPING:
        return kind
    if "auto_map" not in written:
        raise UserError(f"{path / 'config.json'}: model_type {kind!r} is not known to Trimline or the installed transformers")
    if not trust_remote_code:
        raise UserError(f"{path}: a model of type {kind!r} runs code from its directory; if you trust it, set model.trust_remote_code: true")
    return kind


def _check_head(path: Path, config: PretrainedConfig, head: Head) -> None:
    if config.model_type == "trimline":
        kind = config.kind
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        kind = "decoder" if getattr(config, "is_decoder", False) else "encoder"
    else:
        return
    if head != "none" and (kind == "decoder") != (head == "causal"):
        wanted = "a decoder" if head == "causal" else "an encoder"
        raise UserError(f"{path}: a model of kind {kind} ({config.model_type}) cannot have the head {head}; give {wanted}")


def _set_labels(path: Path, config: PretrainedConfig, labels: Sequence[str] | None, regression: bool) -> None:
    names = ["score"] if regression else list(labels) if labels is not None else None
    if names is None:
        return
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if classifies and config.num_labels != len(names):
        raise UserError(f"{path}: was fine-tuned for {config.num_labels} labels, the task has {len(names)}; start from the model before fine-tuning")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.problem_type = "regression" if regression else "single_label_classification"


def _check_complete(path: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Only what stands on the body may be new."""
    for name, found, expected in report["mismatched_keys"]:
        raise UserError(f"{path}: {name} is {list(found)} in the weights, {list(expected)} by config.json; take a whole copy of the model")
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    lacking = sorted(name for name in report["missing_keys"] if name.startswith(body) and "pooler" not in name)
    if lacking:
        raise UserError(f"{path}: the weights lack {len(lacking)} tensors that config.json asks for, as {lacking[0]}; take a whole copy of the model")
