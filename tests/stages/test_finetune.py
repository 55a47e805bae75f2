from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.artifacts import Artifact
from pipeline.errors import UserError
from pipeline.models import export
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForMaskedLM
from pipeline.recipe import Recipe
from pipeline.stages import evaluate, finetune
from pipeline.tasks import metrics
from pipeline.tasks import task as tasks
from pipeline.workflow import Work


@pytest.fixture
def make_work(tmp_path, finetuned):
    """The toy task of `finetuned`, from an encoder with random weights."""

    def make(start=None, **task):
        if start is None:
            torch.manual_seed(0)
            shape = {"hidden_size": 32, "head_dim": 8, "heads_per_layer": [4, 4], "ffn_per_layer": [64, 64], "max_position_embeddings": 16}
            start = tmp_path / "start"
            export.save(TrimlineForMaskedLM(TrimlineConfig(vocab_size=len(finetuned.tokenizer), dropout=0.0, **shape)), finetuned.tokenizer, start)
        training = {"epochs": 8.5, "batch_size": 32, "lr": 2e-3, "log_every": 50, "deepspeed": "zero0"}
        section = {**training, "task": {**finetuned.recipe.finetune.task.model_dump(), **task}}
        recipe = Recipe.model_validate({"name": "toy", "model": {"from": str(start)}, "finetune": section})
        (tmp_path / "work").mkdir()
        return Work("finetune", recipe, {}, tmp_path / "work", tmp_path / "logs")

    return make


def test_a_pretrained_encoder_learns_the_task(make_work):
    work = make_work()
    figures = finetune.run(work)
    assert figures["steps"] == 136  # 8.5 passes over 512 examples, 32 a step
    assert figures["dev_accuracy"] > 0.9
    assert json.loads(json.dumps(figures)) == figures
    assert sorted(path.name for path in work.directory.iterdir()) == ["model", "scratch", "task.json"]

    model = AutoModelForSequenceClassification.from_pretrained(work.directory / "model")
    assert model.config.id2label == {0: "bad", 1: "good"}
    task = tasks.load(work.recipe.finetune.task, work.recipe.seed)
    assert tasks.open(work.directory / "task.json") == task
    tokenizer = AutoTokenizer.from_pretrained(work.directory / "model")
    assert metrics.evaluate(model, tokenizer, task, "dev", 150)["accuracy"] == pytest.approx(figures["dev_accuracy"], abs=1e-3)


def test_a_regression_learns_numbers(make_work, tmp_path, finetuned):
    for split in ("train", "dev"):
        texts = [example.text for example in finetuned.task.splits[split]]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text, "label": text.count("good") / 7}) + "\n" for text in texts))
    work = make_work(train=str(tmp_path / "train.jsonl"), dev=str(tmp_path / "dev.jsonl"), test=None, kind="regression")
    figures = finetune.run(work)
    assert figures["dev_spearman"] > 0.8
    assert AutoModelForSequenceClassification.from_pretrained(work.directory / "model").config.problem_type == "regression"


def squad_file(path, questions, seed):
    """Contexts of 90 bad words, more than a window of 80 tokens takes, with a good one among them, which is the answer."""
    draws, paragraphs = np.random.default_rng(seed), []
    for number in range(questions):
        words = [f"bad{draw}" for draw in draws.integers(8, size=90)]
        place = int(draws.integers(90))
        words[place] = f"good{draws.integers(8)}"
        answer = {"text": words[place], "answer_start": len(" ".join(words[:place])) + (place > 0)}
        paragraphs.append({"context": " ".join(words), "qas": [{"id": str(number), "question": "bad0 bad1", "answers": [answer]}]})
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return str(path)


def test_questions_are_answered_by_spans_and_scored_again_by_evaluate(tmp_path, finetuned):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "head_dim": 8, "heads_per_layer": [4], "ffn_per_layer": [64], "max_position_embeddings": 80}
    start = TrimlineForMaskedLM(TrimlineConfig(vocab_size=len(finetuned.tokenizer), dropout=0.0, **shape))
    tokenizer = copy.deepcopy(finetuned.tokenizer)
    pair = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer.backend_tokenizer.post_processor = pair
    export.save(start, tokenizer, tmp_path / "start")
    files = {
        split: squad_file(tmp_path / f"{split}.json", questions, seed) for seed, (split, questions) in enumerate({"train": 120, "dev": 40}.items())
    }
    training = {"epochs": 6, "batch_size": 16, "lr": 5e-3, "log_every": 50, "deepspeed": "zero0"}
    task = {"squad": {**files, "doc_stride": 4}, "max_length": 80}
    latency = {"batch_size": 1, "length": 8, "repeats": 3}
    recipe = {"name": "toy", "model": {"from": str(tmp_path / "start")}, "finetune": {**training, "task": task}, "evaluate": {"latency": latency}}
    (tmp_path / "work").mkdir()
    work = Work("finetune", Recipe.model_validate(recipe), {}, tmp_path / "work", tmp_path / "logs")
    figures = finetune.run(work)
    assert figures["steps"] == 90  # six passes over two windows of each of 120 questions, 16 a step
    assert figures["dev_exact_match"] == figures["dev_f1"] > 0.9
    assert figures["loss_span"] < 0.5
    assert AutoModelForQuestionAnswering.from_pretrained(work.directory / "model").qa_outputs.out_features == 2

    (tmp_path / "report").mkdir()
    inputs = {"finetune": Artifact(work.directory, {"fingerprint": "0" * 64, "seconds": 1.0, "metrics": figures, "versions": {}})}
    found = evaluate.run(Work("evaluate", work.recipe, inputs, tmp_path / "report", tmp_path / "logs"))
    assert found["test_f1_finetuned"] == figures["dev_f1"]
    assert "exact_match (test)" in (tmp_path / "report" / "report.md").read_text()


def test_examples_longer_than_the_model_takes_are_refused(make_work):
    with pytest.raises(UserError, match="takes 16 tokens, rows have 32"):
        finetune.run(make_work(max_length=32))


def test_a_start_that_is_no_model_is_refused(make_work, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        finetune.run(make_work(tmp_path / "nowhere"))
