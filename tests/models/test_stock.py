"""BERT and RoBERTa as Hugging Face has them, and as ours."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
)

from pipeline.compression.surgery import remove
from pipeline.models import build, export, stock
from pipeline.models.modeling_trimline import TrimlinePreTrainedModel

AUTO = {
    "mlm": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "qa": AutoModelForQuestionAnswering,
    "none": AutoModel,
}
CONFIGS = {"bert": BertConfig, "roberta": RobertaConfig}
PADDING = {"bert": 0, "roberta": 1}


def shape(family, **changes):
    """Small, with a position for 16 tokens and the padding token of the family."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    own = {"bert": {"max_position_embeddings": 16}, "roberta": {"max_position_embeddings": 18, "type_vocab_size": 1, "layer_norm_eps": 1e-5}}[family]
    return CONFIGS[family](**{**sizes, **own, "initializer_range": 0.3, "num_labels": 2, **changes})


def made(family, head, directory, **changes):
    """A stock model with random weights, biases and LayerNorms too, saved in the directory."""
    model = AUTO[head].from_config(shape(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    model.save_pretrained(directory)
    return model


def inputs(family):
    """Rows of 16, 9 and 5 tokens."""
    mask = (torch.arange(16) < torch.tensor([[16], [9], [5]])).long()
    return {"input_ids": torch.where(mask == 1, torch.randint(5, 40, (3, 16)), PADDING[family]), "attention_mask": mask}


NAMES = {"qa": ("start_logits", "end_logits"), "none": ("last_hidden_state", "pooler_output")}


def given(output, head):
    return [output[name] for name in NAMES.get(head, ("logits",))]


def assert_equal(found, expected, mask):
    for one, other in zip(found, expected, strict=True):
        real = mask.bool() if one.shape[:2] == mask.shape else slice(None)
        torch.testing.assert_close(one[real], other[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", AUTO)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_stock_model_becomes_ours_and_is_saved_as_stock_again(family, head, tmp_path):
    theirs, batch = made(family, head, tmp_path), inputs(family)
    ours = build.load(tmp_path, head=head).eval()
    assert isinstance(ours, TrimlinePreTrainedModel)
    assert (ours.config.family, ours.config.max_position_embeddings, ours.config.pad_token_id) == (family, 16, PADDING[family])
    expected, found = (model(**batch, output_hidden_states=True) for model in (theirs, ours))
    assert_equal(found.hidden_states, expected.hidden_states, batch["attention_mask"])
    assert_equal(given(found, head), given(expected, head), batch["attention_mask"])

    export.save(ours, None, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == (family, [type(theirs).__name__])
    assert written["max_position_embeddings"] == theirs.config.max_position_embeddings
    again = AUTO[head].from_pretrained(tmp_path / "again").eval()
    assert type(again) is type(theirs)
    assert_equal(given(again(**batch), head), given(expected, head), batch["attention_mask"])


@pytest.mark.parametrize("layers", [1, 5])
def test_a_roberta_of_any_depth_is_pruned_and_loads_again(layers, tmp_path):
    made("roberta", "classification", tmp_path, num_hidden_layers=layers)
    ours, batch = build.load(tmp_path, head="classification").eval(), inputs("roberta")
    masks = {"heads": torch.ones(layers, 4), "neurons": torch.rand(layers, 48), "hidden": torch.ones(32)}
    masks["heads"][0, 0] = masks["neurons"][0, 7] = masks["hidden"][5] = 0
    removed = remove(ours, masks)
    export.save(removed, None, tmp_path / "removed")
    again = build.load(tmp_path / "removed", head="classification").eval()
    torch.testing.assert_close(again(**batch).logits, ours(**batch, masks=masks).logits, atol=1e-5, rtol=1e-5)


def test_a_pretrained_roberta_takes_a_classifier(tmp_path):
    theirs = made("roberta", "mlm", tmp_path)
    ours = build.load(tmp_path, head="classification", labels=["no", "yes"])
    assert ours.config.id2label == {0: "no", 1: "yes"}
    assert torch.equal(ours.model.layers[2].feed_forward.up.weight, theirs.roberta.encoder.layer[2].intermediate.dense.weight)


@pytest.mark.parametrize("family", CONFIGS)
def test_two_token_types_are_kept_apart_and_one_goes_into_the_positions(family, tmp_path):
    for types in (2, 1):
        theirs, batch = made(family, "none", tmp_path, type_vocab_size=types), inputs(family)
        batch["token_type_ids"] = torch.randint(0, types, batch["input_ids"].shape)
        ours = build.load(tmp_path, head="none").eval()
        assert ours.config.type_vocab_size == (types if types > 1 else 0)
        assert_equal([ours(**batch).last_hidden_state], [theirs(**batch).last_hidden_state], batch["attention_mask"])


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu_pytorch_tanh"])
def test_berts_with_other_activations_are_ours_too(activation, tmp_path):
    theirs, batch = made("bert", "mlm", tmp_path, hidden_act=activation), inputs("bert")
    ours = build.load(tmp_path).eval()
    assert_equal([ours(**batch).logits], [theirs(**batch).logits], batch["attention_mask"])
    export.save(ours, None, tmp_path / "again")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again").eval()
    assert again.config.hidden_act == activation
    assert_equal([again(**batch).logits], [theirs(**batch).logits], batch["attention_mask"])


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (shape("bert", hidden_act="silu"), "hidden_act is 'silu'; of a model of type 'bert' Trimline takes gelu, relu"),
        (shape("roberta", hidden_act="relu"), "hidden_act is 'relu'; of a model of type 'roberta' Trimline takes gelu"),
        (shape("bert", tie_word_embeddings=False), "tie_word_embeddings"),
        (shape("roberta", is_decoder=True), "is_decoder"),
        (DistilBertConfig(), "'distilbert' is neither a BERT nor a RoBERTa"),
    ],
)
def test_why_others_stay_hugging_faces_own(config, why):
    assert why in stock.unlike(config)


def test_others_load_as_hugging_faces_own(tmp_path):
    DistilBertModel(DistilBertConfig(vocab_size=40, dim=32, n_layers=1, n_heads=4, hidden_dim=48)).save_pretrained(tmp_path / "distilbert")
    assert type(build.load(tmp_path / "distilbert", head="none")) is DistilBertModel
    theirs = made("bert", "mlm", tmp_path / "silu", hidden_act="silu")
    assert type(build.load(tmp_path / "silu")) is type(theirs)
