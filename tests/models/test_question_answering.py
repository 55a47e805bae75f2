from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForQuestionAnswering,
    BertModel,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
)

from pipeline.models import build, export
from pipeline.models.modeling_trimline import TrimlineForMaskedLM, TrimlineForQuestionAnswering

BERT = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 16}


def randomised(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def same(first, second):
    return torch.allclose(first.start_logits, second.start_logits, atol=1e-5) and torch.allclose(first.end_logits, second.end_logits, atol=1e-5)


def test_start_and_end_are_scored_at_every_place_and_the_loss_is_the_mean_of_both(make_config, rows):
    model = randomised(TrimlineForQuestionAnswering(make_config()))
    start, end = torch.tensor([1, 0, 4]), torch.tensor([3, 0, 4])
    found = model(*rows, start_positions=start, end_positions=end)
    assert found.start_logits.shape == found.end_logits.shape == (3, 12)
    assert found.last_hidden_state.shape == (3, 12, 32)
    assert torch.allclose(found.loss, (F.cross_entropy(found.start_logits, start) + F.cross_entropy(found.end_logits, end)) / 2)
    assert model(*rows).loss is None
    assert "pooler" not in " ".join(model.state_dict())


def test_a_bert_shaped_model_exports_as_stock_bert_and_comes_back(make_config, rows, tmp_path):
    model = randomised(TrimlineForQuestionAnswering(make_config()))
    export.save(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForQuestionAnswering"]
    stock = AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert type(stock) is BertForQuestionAnswering
    assert same(stock(*rows), model(*rows))
    ours = build.load(tmp_path, head="qa").eval()
    assert type(ours) is TrimlineForQuestionAnswering
    assert same(ours(*rows), model(*rows))


@pytest.mark.parametrize("labels", [2, 5])
def test_any_encoder_takes_the_head_whatever_its_directory_says_of_labels(make_config, rows, tmp_path, labels):
    randomised(BertModel(BertConfig(**BERT, num_labels=labels))).save_pretrained(tmp_path / "bert")
    export.save(TrimlineForMaskedLM(make_config(norm="pre", num_labels=labels)), None, tmp_path / "ours")
    for name in ("bert", "ours"):
        model = build.load(tmp_path / name, head="qa").eval()
        assert type(model) is TrimlineForQuestionAnswering
        export.save(model, None, tmp_path / "again")
        assert same(build.load(tmp_path / "again", head="qa").eval()(*rows), model(*rows))
    small = DistilBertConfig(vocab_size=40, dim=32, n_layers=1, n_heads=4, hidden_dim=64)
    DistilBertForQuestionAnswering(small).save_pretrained(tmp_path / "distilbert")
    assert type(build.load(tmp_path / "distilbert", head="qa")) is DistilBertForQuestionAnswering


FRESH = """
import sys
sys.modules["pipeline"] = None  # importing it, or anything in it, is an error from here on
import torch, transformers
model = transformers.AutoModelForQuestionAnswering.from_pretrained("model", trust_remote_code=True).eval()
found = model(*torch.load("inputs.pt"))
torch.save((found.start_logits, found.end_logits), "outputs.pt")
"""


def test_a_pruned_shape_loads_in_a_process_without_trimline(make_config, rows, tmp_path):
    model = randomised(TrimlineForQuestionAnswering(make_config(heads_per_layer=[1, 4], ffn_per_layer=[0, 7])))
    export.save(model, None, tmp_path / "model")
    torch.save(rows, tmp_path / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", FRESH], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, expected = torch.load(tmp_path / "outputs.pt"), model(*rows)
    assert torch.allclose(found[0], expected.start_logits, atol=1e-5)
    assert torch.allclose(found[1], expected.end_logits, atol=1e-5)
