from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, PreTrainedTokenizerFast

from pipeline.corpus.store import Store, Writer
from pipeline.models import build, export, size
from pipeline.models.settings import ModelSettings
from pipeline.packing import plan
from pipeline.packing.settings import PackSettings

SPECIALS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
# A process of its own: a training sets up torch.distributed for good.
RUN = """
import json, sys
from pathlib import Path
from pipeline.artifacts import Artifact
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.stages import pretrain
from pipeline.workflow import Work
here = Path.cwd()
recipe = Recipe.model_validate(json.loads(sys.argv[1]))
inputs = {stage: Artifact(here / stage, {}) for stage in ("tokenize", "pack")}
for name in ("work", "logs"):
    (here / name).mkdir(exist_ok=True)
try:
    metrics = pretrain.run(Work("pretrain", recipe, inputs, here / "work", here / "logs"))
except UserError as error:
    sys.exit(f"UserError: {error}")
(here / "metrics.json").write_text(json.dumps(metrics))
"""


def make_inputs(directory: Path, kind: str, pack: dict | None = None) -> None:
    """A token store of a toy language (eight of 55 words, in turn), its tokenizer and its plan."""
    words = [*SPECIALS.values(), *(f"w{number}" for number in range(5, 60))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, cls_token="<s>", sep_token="</s>", **SPECIALS).save_pretrained(
        directory / "tokenize" / "tokenizer"
    )
    (directory / "tokenize" / "train").mkdir()
    with Writer(directory / "tokenize" / "train" / "00000", np.uint16) as writer:
        for document in range(100):
            writer.add([*(5 + (np.arange(30) + document) % 8), 3])
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenize" / "tokenizer")
    settings = PackSettings(length=16, **(pack or {}))
    plan.make(directory / "pack" / "train", settings, kind, Store.open(directory / "tokenize" / "train"), tokenizer)


def run(directory: Path, model: dict, pack: dict | None = None, **pretrain: object) -> subprocess.CompletedProcess[str]:
    sections = {
        "tokenize": {},
        "pack": {"length": 16, **(pack or {})},
        "model": {"layers": 2, "hidden": 32, "heads": 2, "ffn": 64, "max_length": 16, "dropout": 0, **model},
    }
    settings = {"steps": 60, "batch_size": 16, "micro_batch_size": 16, "lr": 1e-2, "log_every": 30, "deepspeed": "zero0", **pretrain}
    recipe = json.dumps({"name": "toy", **sections, "pretrain": settings})
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{RUN}", recipe],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_an_encoder_comes_out_as_stock_bert_and_serves_as_a_start(tmp_path):
    make_inputs(tmp_path, "encoder")
    done = run(tmp_path, {})
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 60
    assert metrics["loss_mlm"] < math.log(60) - 1.5
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "work" / "model")
    assert type(model) is BertForMaskedLM
    types = model.bert.embeddings.token_type_embeddings.weight.numel()
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters()) - types
    assert AutoTokenizer.from_pretrained(tmp_path / "work" / "model").mask_token_id == 4

    (tmp_path / "work").rename(tmp_path / "first")
    start = {"from": str(tmp_path / "first" / "model")}
    done = run(tmp_path, start, steps=1, lr=1e-9)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["loss_mlm"] == pytest.approx(metrics["loss_mlm"], abs=0.4), "training did not start from the weights given"


def test_documents_packed_into_rows_without_cutting_train_apart_from_one_another_with_two_fifths_hidden(tmp_path):
    pack = {"segments": "best_fit"}
    make_inputs(tmp_path, "encoder", pack)
    options = {"document_mask": True, "objective": {"name": "mlm", "mask_rate": 0.4}, "batch_size": 15, "micro_batch_size": 15}
    done = run(tmp_path, {}, pack, **options, log_every=60)  # four epochs: a document of 31 tokens gives two rows and a quarter of one
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["loss_mlm"] < math.log(60) - 1
    last = json.loads((tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens_per_second"] / last["rows_per_second"] == pytest.approx((200 * 16 + 25 * 14) / 225), "padding is no token"


def test_an_objectives_weights_hold_where_the_recipe_has_none_and_a_wrong_name_is_told(tmp_path):
    make_inputs(tmp_path, "encoder")
    controller = {"objective": {"name": "meta_controller", "generator": {"heads": 1}}, "steps": 2, "log_every": 1}
    done = run(tmp_path, {}, **controller, loss_weights={"mlm": 2.0})
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["loss"] == pytest.approx(2 * record["losses"]["mlm"] + 50 * record["losses"]["choice"])
    assert round(record["ratios"]["accuracy_replaced"], 4) == json.loads((tmp_path / "metrics.json").read_text())["accuracy_replaced"]
    shutil.rmtree(tmp_path / "work")
    done = run(tmp_path, {}, **controller, loss_weights={"choices": 1.0})
    assert "loss_weights: no loss is called choices; the losses here are choice, mlm" in done.stderr


@pytest.mark.parametrize("objective", ["electra", "meta_controller"])
def test_the_generator_stays_behind(objective, tmp_path):
    make_inputs(tmp_path, "encoder")
    done = run(tmp_path, {}, objective={"name": objective}, steps=20)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {"loss_mlm", "replaced", "accuracy_replaced"} <= metrics.keys()
    model = AutoModel.from_pretrained(tmp_path / "work" / "model", add_pooling_layer=False)
    assert model.config.model_type == "bert"
    head = 32 * 32 + 3 * 32 + 60 if objective == "meta_controller" else 0
    pooler = 0 if objective == "meta_controller" else 32 * 32 + 32
    types = model.embeddings.token_type_embeddings.weight.numel()
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters()) - types + head + pooler


@pytest.mark.parametrize("way", ["distilled", "pruned"])
def test_a_model_becomes_smaller_on_text_alone(tmp_path, way):
    make_inputs(tmp_path, "encoder")
    settings = ModelSettings(layers=2, hidden=32, heads=2, ffn=64, max_length=16)
    teacher = build.new(settings, AutoTokenizer.from_pretrained(tmp_path / "tokenize" / "tokenizer"))
    export.save(teacher, None, tmp_path / "teacher")
    student = {"student": {"layers": 1, "heads": 1, "ffn": 24}, "layers": 0} if way == "distilled" else {}
    pruning = {} if student else {"sparsity": {"target": 0.5, "units": ["heads", "neurons", "hidden"]}, "steps": 100}
    done = run(tmp_path, {"from": str(tmp_path / "teacher")}, objective={"name": "distill", **student}, **pruning)
    assert done.returncode == 0, done.stderr
    metrics, model = json.loads((tmp_path / "metrics.json").read_text()), build.load(tmp_path / "work" / "model")
    config = model.config
    assert metrics["loss_distill"] < 0.1
    assert metrics["parameters"] == size.parameters(model)
    if student:
        assert (config.heads_per_layer, config.ffn_per_layer, config.hidden_size) == ([1], [24], 32)
    else:
        assert 1 - size.block_parameters(config) / size.block_parameters(teacher.config) == pytest.approx(0.5, abs=0.1)  # of four heads
        assert config.hidden_size < 32 or sum(config.heads_per_layer) < 4
        assert len(json.loads((tmp_path / "work" / "structure.json").read_text())["layers"]) == 2


def test_notes_are_taken_logged_and_thrown_away(tmp_path):
    make_inputs(tmp_path, "encoder")
    done = run(tmp_path, {}, notes={"frequency": [300, 500], "window": 2}, steps=12, log_every=1)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()[-1])["side"]
    assert (figures["coverage"], figures["rows_with_rare_words"], figures["words_written"]) == (1, 1, 8)
    assert figures["hits"] == pytest.approx(0.85, abs=0.08)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "work" / "model")
    assert type(model) is BertForMaskedLM
    with safe_open(tmp_path / "work" / "model" / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) <= set(model.state_dict())


def test_notes_that_no_word_has_and_notes_for_a_strange_model_are_refused(tmp_path):
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    make_inputs(tmp_path, "encoder")
    done = run(tmp_path, {}, notes={"frequency": [9, 20]})
    assert "pretrain.notes.frequency [9, 20]: no word of the corpus occurs so often" in done.stderr
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 16}
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=60, **shape)).save_pretrained(tmp_path / "other")
    done = run(tmp_path, {"from": str(tmp_path / "other")}, notes={})
    assert "not of one of type 'distilbert'" in done.stderr


def test_a_decoder_is_trained_and_exported_with_its_code(tmp_path):
    make_inputs(tmp_path, "decoder")
    done = run(tmp_path, {"kind": "decoder", "norm": "pre"}, objective={"name": "causal"})
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["loss_causal"] < math.log(60) - 1.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "model", trust_remote_code=True)
    assert model.config.kind == "decoder"


def test_rows_longer_than_a_given_model_takes_are_refused(tmp_path):
    from transformers import BertConfig

    make_inputs(tmp_path, "encoder")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=60, max_position_embeddings=8, **shape)).save_pretrained(tmp_path / "short")
    done = run(tmp_path, {"from": str(tmp_path / "short")})
    assert done.returncode != 0
    assert "UserError" in done.stderr
    assert f"{tmp_path / 'short'}: the model takes 8 tokens, rows have 16" in done.stderr


def gpt2(directory: Path, kind: str = "gpt2") -> dict:
    """A checkpoint that somebody else made."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0))
    else:
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
        model = Gemma2ForCausalLM(Gemma2Config(vocab_size=60, intermediate_size=32, final_logit_softcapping=0.01, **shape))
    model.save_pretrained(directory / kind)
    return {"from": str(directory / kind), "kind": "decoder"}


def test_training_of_somebody_elses_checkpoint_goes_on_with_long_memory(tmp_path):
    pack = {"groups": "consecutive", "group_size": 2, "segments": "within"}
    make_inputs(tmp_path, "decoder", pack)
    done = run(tmp_path, gpt2(tmp_path), pack, objective={"name": "trimelm_long", "chunk": 8}, steps=80, log_every=1)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert set(records[0]["losses"]) == {"trime", "cross_entropy", "memory_share"}
    assert records[3]["losses"]["memory_share"] == 0, "5 % of the steps learn without memory"
    assert records[4]["losses"]["memory_share"] > 0
    assert records[-1]["loss"] == records[-1]["losses"]["trime"] < 1.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "model")
    assert model.config.model_type == "gpt2"


def test_a_model_that_changes_its_scores_after_the_output_matrix_is_refused_before_training(tmp_path):
    make_inputs(tmp_path, "decoder")
    done = run(tmp_path, gpt2(tmp_path, "gemma2"), objective={"name": "trimelm"})
    assert "a model of type 'gemma2' changes the scores after its output matrix" in done.stderr
