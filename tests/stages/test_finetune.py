from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import UserError
from pipeline.models import export
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForMaskedLM
from pipeline.recipe import Recipe
from pipeline.stages import finetune
from pipeline.tasks import metrics
from pipeline.tasks import task as tasks
from pipeline.tasks.task import Task
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
    assert Task.open(work.directory / "task.json") == task
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


def test_examples_longer_than_the_model_takes_are_refused(make_work):
    with pytest.raises(UserError, match="takes 16 tokens, rows have 32"):
        finetune.run(make_work(max_length=32))


def test_a_start_that_is_no_model_is_refused(make_work, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        finetune.run(make_work(tmp_path / "nowhere"))
