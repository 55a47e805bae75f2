from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from pipeline.errors import UserError
from pipeline.models import build, export
from pipeline.models.modeling_trimline import (
    TrimlineForCausalLM,
    TrimlineForMaskedLM,
    TrimlineForQuestionAnswering,
    TrimlineForSequenceClassification,
    TrimlineModel,
)
from pipeline.models.positions import SCHEMES
from pipeline.models.settings import ModelSettings


def randomised(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def stock_bert(model_class=BertForMaskedLM, **changes):
    shape = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return randomised(model_class(BertConfig(**{**shape, "max_position_embeddings": 16, **changes})))


def test_new_takes_vocabulary_and_special_tokens_from_the_tokenizer(tokenizer):
    encoder = build.new(ModelSettings(hidden=32, heads=4, layers=3, ffn=64), tokenizer)
    assert isinstance(encoder, TrimlineForMaskedLM)
    assert (encoder.config.vocab_size, encoder.config.pad_token_id, encoder.config.eos_token_id) == (25, 0, 3)
    assert (encoder.config.heads_per_layer, encoder.config.ffn_per_layer, encoder.config.head_dim) == ([4, 4, 4], [64, 64, 64], 8)
    decoder = build.new(ModelSettings(hidden=32, heads=4, layers=1, ffn=64, kind="decoder", norm="pre"), tokenizer)
    assert isinstance(decoder, TrimlineForCausalLM)


def test_equal_seeds_give_equal_models(tokenizer):
    def weights(seed):
        torch.manual_seed(seed)
        return build.new(ModelSettings(hidden=32, heads=4, layers=1, ffn=64), tokenizer).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embeddings.word.weight"], other["model.embeddings.word.weight"])


def test_a_bert_shaped_encoder_exports_as_stock_bert_with_equal_logits(make_config, tokenizer, rows, tmp_path):
    model = randomised(TrimlineForMaskedLM(make_config(vocab_size=40)))
    export.save(model, tokenizer, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("bert", ["BertForMaskedLM"])
    assert not list(tmp_path.glob("*.py"))
    assert not list(tmp_path.glob("*.bin"))
    stock = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert type(stock) is BertForMaskedLM
    ids, mask = rows
    assert torch.allclose(stock(ids, mask).logits, model(ids, mask).logits, atol=1e-5)
    assert not stock.bert.embeddings.token_type_embeddings.weight.any()
    assert AutoTokenizer.from_pretrained(tmp_path)("w1 w2").input_ids == tokenizer("w1 w2").input_ids


def test_a_classifier_exports_as_stock_bert_with_its_labels(make_config, rows, tmp_path):
    names = {0: "bad", 1: "fair", 2: "good"}
    model = randomised(TrimlineForSequenceClassification(make_config(id2label=names, label2id={name: number for number, name in names.items()})))
    export.save(model, None, tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(stock) is BertForSequenceClassification
    assert stock.config.id2label == names
    assert torch.allclose(stock(*rows).logits, model(*rows).logits, atol=1e-5)
    ours = build.load(tmp_path, head="classification").eval()
    assert isinstance(ours, TrimlineForSequenceClassification)
    assert torch.allclose(ours(*rows).logits, model(*rows).logits, atol=1e-5)


@pytest.mark.parametrize("shape", [{}, {"norm": "pre"}, {"heads_per_layer": [3, 0], "ffn_per_layer": [0, 7]}, {"heads_per_layer": [2, 2]}])
def test_save_and_load_give_equal_logits(make_config, tokenizer, rows, tmp_path, shape):
    model = randomised(TrimlineForMaskedLM(make_config(**shape)))
    export.save(model, tokenizer, tmp_path)
    again = build.load(tmp_path, head="mlm").eval()
    assert type(again) is TrimlineForMaskedLM
    assert again.config.heads_per_layer == model.config.heads_per_layer
    assert again.config.type_vocab_size == 0
    assert torch.allclose(again(*rows).logits, model(*rows).logits, atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_given_weights_are_saved_in_place_of_the_models_own(make_config, rows, tmp_path, norm):
    model, trained = TrimlineForMaskedLM(make_config(norm=norm)), randomised(TrimlineForMaskedLM(make_config(norm=norm)))
    weights = trained.state_dict()
    del weights["head.decoder.weight"]  # a state dict may give a tied parameter one name
    export.save(model, None, tmp_path, weights)
    assert torch.allclose(build.load(tmp_path).eval()(*rows).logits, trained(*rows).logits, atol=1e-5)
    del weights["model.embeddings.word.weight"]
    with pytest.raises(AssertionError, match=r"model\.embeddings\.word\.weight"):
        export.save(model, None, tmp_path, weights)


FRESH = """
import sys
sys.modules["pipeline"] = None  # importing it, or anything in it, is an error from here on
import torch, transformers
inputs = torch.load("inputs.pt")
for name in sys.argv[1:]:
    assert transformers.AutoConfig.from_pretrained(name, trust_remote_code=True).model_type == "trimline"
    model = getattr(transformers, name.partition("-")[0]).from_pretrained(name, trust_remote_code=True).eval()
    body = transformers.AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    output = model(*inputs)
    torch.save((output["start_logits" if "QuestionAnswering" in name else "logits"], body(*inputs).last_hidden_state), f"{name}.pt")
"""


def test_exported_models_load_in_a_process_without_trimline(make_config, pruned, rows, tmp_path):
    models = {
        "AutoModelForMaskedLM": TrimlineForMaskedLM(make_config(heads_per_layer=[3, 0], ffn_per_layer=[0, 7])),
        "AutoModelForCausalLM": TrimlineForCausalLM(make_config(kind="decoder", norm="pre")),
        "AutoModelForSequenceClassification": TrimlineForSequenceClassification(make_config(heads_per_layer=[1, 4], num_labels=3)),
    }
    kinds = [TrimlineForMaskedLM, TrimlineForSequenceClassification, TrimlineForQuestionAnswering]
    for scheme, kind in zip(SCHEMES, kinds * len(SCHEMES), strict=False):
        name = kind.__name__.replace("TrimlineFor", "AutoModelFor")
        models[f"{name}-{scheme}"] = pruned(randomised(kind(make_config(positions=scheme, unpadded=True))))
    decoder = TrimlineForCausalLM(make_config(kind="decoder", norm="pre", positions="rope"))
    models["AutoModelForCausalLM-rope"] = pruned(randomised(decoder))
    for name, model in models.items():
        export.save(model if "-" in name else randomised(model), None, tmp_path / name)
    torch.save(rows, tmp_path / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", FRESH, *models], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        found, hidden = torch.load(tmp_path / f"{name}.pt")
        expected = model(*rows)
        torch.testing.assert_close(found, expected["start_logits" if "QuestionAnswering" in name else "logits"], atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(hidden, expected.last_hidden_state, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [{}, {"positions": "tupe-relative"}])
def test_a_body_alone_exports_loads_and_takes_a_head(make_config, rows, tmp_path, shape):
    """The plain one as stock BERT's own body."""
    body = randomised(TrimlineModel(make_config(**shape)))
    export.save(body, None, tmp_path)
    expected = body(*rows)
    if not shape:
        stock = AutoModel.from_pretrained(tmp_path).eval()
        assert type(stock) is BertModel
        assert torch.allclose(stock(*rows).last_hidden_state, expected.last_hidden_state, atol=1e-5)
        assert torch.allclose(stock(*rows).pooler_output, expected.pooler_output, atol=1e-5)
    assert torch.allclose(build.load(tmp_path, head="none").eval()(*rows).pooler_output, expected.pooler_output, atol=1e-5)
    classifier = build.load(tmp_path, head="classification", labels=["a", "b"]).eval()
    assert torch.allclose(classifier.model(*rows).pooler_output, expected.pooler_output, atol=1e-5)


def test_a_body_without_a_pooler_is_stock_bert_without_one(make_config, rows, tmp_path):
    body = randomised(TrimlineForMaskedLM(make_config())).model
    export.save(body, None, tmp_path)
    assert torch.allclose(AutoModel.from_pretrained(tmp_path).eval()(*rows).last_hidden_state, body(*rows).last_hidden_state, atol=1e-5)


def test_a_body_that_lacks_weights_is_refused(make_config, tmp_path):
    export.save(TrimlineModel(make_config(positions="rope")), None, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layers.0.attention.key.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors.*layers\.0\.attention\.key\.weight"):
        build.load(tmp_path, head="none")


@pytest.mark.parametrize(
    ("saved", "asked", "refused"),
    [
        ("absolute", "tupe-relative", True),
        ("tupe-absolute", "tupe-relative", True),
        ("tupe-relative", "absolute", True),
        ("tupe-relative", "tupe-relative", False),
        ("tupe-relative", None, False),
        ("absolute", None, False),
    ],
)
def test_positions_that_a_checkpoint_does_not_have_are_refused_where_a_recipe_names_them(make_config, tmp_path, saved, asked, refused):
    export.save(TrimlineForMaskedLM(make_config(positions=saved)), None, tmp_path)
    model = build.load(tmp_path)
    settings = ModelSettings(**{"from": str(tmp_path), **({} if asked is None else {"positions": asked})})
    if refused:
        with pytest.raises(UserError, match=f"sets model.positions: {asked}, the checkpoint has positions {saved}.*leave model.positions out"):
            build.adopt(model, settings)
    else:
        build.adopt(model, settings)


def test_a_loaded_model_runs_unpadded_where_the_recipe_says_so(make_config, tmp_path):
    export.save(TrimlineForMaskedLM(make_config()), None, tmp_path)
    model = build.load(tmp_path)
    build.adopt(model, ModelSettings(unpadded=True))
    assert model.config.unpadded
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4))
    build.adopt(gpt2, ModelSettings(positions="absolute"))
    for settings in (ModelSettings(positions="rope"), ModelSettings(unpadded=True)):
        with pytest.raises(UserError, match=r"leave .* out"):
            build.adopt(gpt2, settings)


def test_stock_bert_loads_as_our_class_with_equal_outputs(rows, tmp_path):
    stock = stock_bert()
    stock.save_pretrained(tmp_path)
    ours = build.load(tmp_path).eval()
    assert type(ours) is TrimlineForMaskedLM
    types = torch.randint(0, 2, rows[0].shape)
    assert torch.allclose(ours(*rows).logits, stock(*rows).logits, atol=1e-5)
    assert torch.allclose(ours(*rows, token_type_ids=types).logits, stock(*rows, token_type_ids=types).logits, atol=1e-5)
    export.save(ours, None, tmp_path / "again")
    again = BertForMaskedLM.from_pretrained(tmp_path / "again").eval()
    assert torch.allclose(again(*rows, token_type_ids=types).logits, stock(*rows, token_type_ids=types).logits, atol=1e-5)


def test_a_body_without_a_head_gets_a_new_one_drawn_from_the_seed(rows, tmp_path):
    stock_bert(BertModel).save_pretrained(tmp_path)

    def classifier(seed):
        torch.manual_seed(seed)
        return build.load(tmp_path, head="classification", labels=["no", "yes", "maybe"])

    first, again, other = classifier(1), classifier(1), classifier(2)
    assert first.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert first(*rows).logits.shape == (3, 3)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.model.pooler.weight, other.model.pooler.weight), "the pooler was there and should have been kept"


def test_our_pretrained_encoder_takes_a_classifier_or_a_regression_head(make_config, tmp_path):
    model = randomised(TrimlineForMaskedLM(make_config(norm="pre")))
    export.save(model, None, tmp_path)
    classifier = build.load(tmp_path, head="classification", labels=["a", "b"])
    assert torch.equal(classifier.model.layers[1].feed_forward.up.weight, model.model.layers[1].feed_forward.up.weight)
    assert classifier.config.label2id == {"a": 0, "b": 1}
    regression = build.load(tmp_path, head="classification", regression=True)
    assert (regression.config.num_labels, regression.config.problem_type) == (1, "regression")


def test_a_classifier_for_other_labels_is_refused(make_config, tmp_path):
    export.save(TrimlineForSequenceClassification(make_config(num_labels=3)), None, tmp_path)
    with pytest.raises(UserError, match="fine-tuned for 3 labels, the task has 2"):
        build.load(tmp_path, head="classification", labels=["a", "b"])


def test_a_decoder_of_another_make_loads_through_transformers_own_class(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    assert type(build.load(tmp_path, head="causal")) is GPT2LMHeadModel


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_weights_are_loaded_in_fp32_whatever_they_were_saved_in(tmp_path, activation):
    stock_bert(hidden_act=activation).bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in build.load(tmp_path).parameters()} == {torch.float32}


@pytest.mark.parametrize(("saved", "head"), [("encoder", "causal"), ("decoder", "mlm"), ("bert", "causal"), ("gpt2", "mlm")])
def test_a_head_that_the_model_cannot_have_is_refused(make_config, tmp_path, saved, head):
    if saved == "bert":
        stock_bert().save_pretrained(tmp_path)
    elif saved == "gpt2":
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4)).save_pretrained(tmp_path)
    else:
        model_class = TrimlineForMaskedLM if saved == "encoder" else TrimlineForCausalLM
        export.save(model_class(make_config(kind=saved, norm="pre")), None, tmp_path)
    with pytest.raises(UserError, match=head):
        build.load(tmp_path, head=head)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_in_place_of_weights_is_refused_and_not_run(tmp_path):
    stock_bert().config.save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    torch.save({"bert.embeddings.word_embeddings.weight": Evil(ran)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle that holds more than tensors.*safetensors"):
        build.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(ran)))
    with pytest.raises(UserError, match=str(tmp_path)):
        build.load(tmp_path)
    assert not ran.exists()


def test_plain_tensors_in_a_bin_file_load(rows, tmp_path):
    stock = stock_bert()
    stock.config.architectures = ["BertForMaskedLM"]
    stock.config.save_pretrained(tmp_path)
    torch.save(stock.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.allclose(build.load(tmp_path).eval()(*rows).logits, stock(*rows).logits, atol=1e-5)


def test_code_in_a_model_directory_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (tmp_path / "modeling_other.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import BertConfig, BertForMaskedLM\n"
        "class OtherConfig(BertConfig):\n    model_type = 'other'\nclass OtherForMaskedLM(BertForMaskedLM):\n    config_class = OtherConfig\n"
    )
    stock = stock_bert()
    stock.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    classes = {"AutoConfig": "modeling_other.OtherConfig", "AutoModelForMaskedLM": "modeling_other.OtherForMaskedLM"}
    written |= {"model_type": "other", "auto_map": classes}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"set model\.trust_remote_code: true"):
        build.load(tmp_path)
    assert not ran.exists()
    assert type(build.load(tmp_path, trust_remote_code=True)).__name__ == "OtherForMaskedLM"
    assert ran.exists()


def test_our_own_directory_never_runs_the_code_that_lies_in_it(make_config, tmp_path):
    export.save(TrimlineForMaskedLM(make_config(norm="pre")), None, tmp_path)
    (tmp_path / "modeling_trimline.py").write_text("raise SystemExit('ran')")
    assert type(build.load(tmp_path, trust_remote_code=True)) is TrimlineForMaskedLM


def test_bad_directories_are_told_apart(make_config, tmp_path):
    def message():
        with pytest.raises(UserError) as error:
            build.load(tmp_path / "model")
        assert str(tmp_path / "model") in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such model directory" in message()
    (tmp_path / "model").mkdir()
    assert "no config.json" in message()
    (tmp_path / "model" / "config.json").write_text("{")
    assert "not a readable model configuration" in message()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "martian"}')
    assert "model_type 'martian' is not known" in message()
    for norm in ("pre", "post"):
        export.save(TrimlineForMaskedLM(make_config(norm=norm)), None, tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        assert "cannot be loaded" in message()
        weights.unlink()
        assert "cannot be loaded" in message()


def test_missing_tensors_and_wrong_shapes_are_errors_not_random_weights(make_config, tmp_path):
    export.save(TrimlineForMaskedLM(make_config(norm="pre")), None, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    taken = weights.pop("model.layers.0.attention.key.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors.*layers\.0\.attention\.key\.weight"):
        build.load(tmp_path)
    save_file({**weights, "model.layers.0.attention.key.weight": taken[:-1].contiguous()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"key\.weight is \[31, 32\] in the weights, \[32, 32\] by config"):
        build.load(tmp_path)


def test_a_loaded_model_must_fit_tokenizer_and_rows(make_config, tokenizer):
    model = TrimlineForMaskedLM(make_config(vocab_size=len(tokenizer)))
    build.check_fits(model, tokenizer, length=16)
    with pytest.raises(UserError, match="takes 16 tokens, rows have 17"):
        build.check_fits(model, tokenizer, length=17)
    with pytest.raises(UserError, match="knows 24 tokens, the tokenizer makes 25"):
        build.check_fits(TrimlineForMaskedLM(make_config(vocab_size=24)), tokenizer, length=16)


def test_a_model_of_another_make_cannot_keep_attention_inside_documents(make_config, tokenizer):
    build.check_fits(TrimlineForMaskedLM(make_config()), tokenizer, length=16, document_mask=True)
    shape = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    other = GPT2LMHeadModel(GPT2Config(**shape))
    build.check_fits(other, tokenizer, length=16)
    with pytest.raises(UserError, match=r"type 'gpt2' cannot keep attention inside documents.* pretrain\.document_mask: false"):
        build.check_fits(other, tokenizer, length=16, document_mask=True)
