"""A model directory that Hugging Face loads where Trimline is not installed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.models import adaptive, attention, modeling_trimline, positions, stock
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlinePreTrainedModel
from pipeline.models.quiet import quiet

AUTO_CLASSES = {
    "encoder": {
        "AutoModelForMaskedLM": "TrimlineForMaskedLM",
        "AutoModelForSequenceClassification": "TrimlineForSequenceClassification",
        "AutoModelForQuestionAnswering": "TrimlineForQuestionAnswering",
    },
    "decoder": {"AutoModelForCausalLM": "TrimlineForCausalLM"},
}


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: str | Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write `save_pretrained` layout with safetensors: stock BERT or RoBERTa where the model is one, else with the modelling files beside.

    The latter load by `Auto...from_pretrained(directory, trust_remote_code=True)`.
    weights: full state dict to write in place of the model's own, which may lie in parts on several ranks (ZeRO-3).
    """
    directory = Path(directory)
    if weights is not None:
        model = _with_weights(model, weights)
    with quiet():
        if isinstance(model, TrimlinePreTrainedModel) and stock.is_stock_shaped(model.config):
            stock.export(model).save_pretrained(directory)
        else:
            model.save_pretrained(directory)
    if isinstance(model, TrimlinePreTrainedModel) and not stock.is_stock_shaped(model.config):
        _add_code(model.config, directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _add_code(config: TrimlineConfig, directory: Path) -> None:
    for module in (modeling_trimline, attention, positions, adaptive):
        assert module.__file__ is not None
        shutil.copyfile(module.__file__, directory / Path(module.__file__).name)
    config = copy.deepcopy(config)
    classes = {"AutoConfig": "TrimlineConfig", "AutoModel": "TrimlineModel", **AUTO_CLASSES[config.kind]}
    config.auto_map = {auto: f"modeling_trimline.{name}" for auto, name in classes.items()}
    config.save_pretrained(directory)


def _with_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    fresh = type(model)(copy.deepcopy(model.config))
    parameters = dict(fresh.named_parameters(remove_duplicate=False))
    given = {id(parameters[name]) for name in weights if name in parameters}
    lacking = [name for name, parameter in parameters.items() if id(parameter) not in given]
    assert not lacking, f"the state dict lacks {lacking}"
    fresh.load_state_dict(weights, strict=False)  # strict would ask for both names of a tied parameter
    return fresh
