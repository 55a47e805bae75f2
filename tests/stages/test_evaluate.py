import json

import numpy as np
import pytest
import torch

from pipeline.artifacts import Artifact
from pipeline.compression import surgery
from pipeline.corpus.store import Store, Writer
from pipeline.models import build, export
from pipeline.models.settings import ModelSettings
from pipeline.packing import plan as plans
from pipeline.packing.settings import PackSettings
from pipeline.recipe import Recipe
from pipeline.stages import evaluate
from pipeline.workflow import Work


def artifact(directory, **metrics):
    return Artifact(directory, {"fingerprint": "0" * 64, "seconds": 1.5, "metrics": metrics, "versions": {"torch": torch.__version__}})


def language_model(directory, tokenizer, kind, documents=40):
    """The artifacts of tokenize, pack and pretrain: random documents, an untrained model."""
    tokenize, pack, pretrain = (directory / stage for stage in ("tokenize", "pack", "pretrain"))
    draws = np.random.default_rng(0)
    tokenizer.save_pretrained(tokenize / "tokenizer")
    (tokenize / "valid").mkdir()
    with Writer(tokenize / "valid" / "00000", np.uint16) as writer:
        lengths = [int(length) for length in draws.integers(3, 30, size=documents)]
        for length in lengths:
            writer.add(draws.integers(5, len(tokenizer), size=length))
    (tokenize / "corpus.json").write_text(json.dumps({"valid_bytes": 2 * sum(lengths)}))
    store = Store.open(tokenize / "valid") if documents else None
    plans.make(pack / "valid", PackSettings(length=12), kind, store, tokenizer)
    torch.manual_seed(0)
    settings = ModelSettings(kind=kind, layers=1, hidden=16, heads=2, ffn=32, max_length=16)
    export.save(build.new(settings, tokenizer), tokenizer, pretrain / "model")
    recipe = {
        "name": "lm", "runs_dir": str(directory), "model": settings.model_dump(by_alias=True), "tokenize": {}, "pack": {"length": 12},
        "pretrain": {"objective": {"name": "mlm" if kind == "encoder" else "causal"}}, "evaluate": {"batch_size": 4},
    }  # fmt: skip
    return recipe, {"tokenize": artifact(tokenize, tokens=sum(lengths)), "pack": artifact(pack), "pretrain": artifact(pretrain)}, sum(lengths)


def test_a_causal_recipe_has_perplexity_and_bits_per_byte(finetuned, tmp_path):
    recipe, inputs, tokens = language_model(tmp_path, finetuned.tokenizer, "decoder")
    (tmp_path / "out").mkdir()
    figures = evaluate.run(Work("evaluate", Recipe.model_validate(recipe), inputs, tmp_path / "out", tmp_path / "logs"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    held_out = report["held_out"]
    assert held_out["segments"] == held_out["of_segments"] == tokens // 12 + (tokens % 12 > 0)
    assert 10 < figures["perplexity"] < 40  # untrained, 21 tokens
    assert held_out["bits_per_byte"] == pytest.approx(held_out["loss"] / np.log(2) / 2)  # two bytes a token
    assert set(report["models"]) == {"pretrained"}
    assert report["stages"][0] == {"stage": "tokenize", "seconds": 1.5, "metrics": {"tokens": tokens}}
    assert "bits per byte" in (tmp_path / "out" / "report.md").read_text()


def test_an_encoder_has_the_perplexity_of_masked_tokens_and_a_part_can_be_scored(finetuned, tmp_path):
    recipe, inputs, _ = language_model(tmp_path, finetuned.tokenizer, "encoder")
    recipe["evaluate"]["max_segments"] = 5
    (tmp_path / "out").mkdir()
    figures = evaluate.run(Work("evaluate", Recipe.model_validate(recipe), inputs, tmp_path / "out", tmp_path / "logs"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert figures["mlm_perplexity"] == round(report["held_out"]["perplexity"], 3)
    assert report["held_out"]["segments"] == 5
    assert report["held_out"]["bits_per_byte"] is None


def test_a_finetune_only_recipe_is_scored_on_the_test_split_before_and_after_pruning(finetuned, tmp_path):
    masks = {"heads": torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]]), "neurons": torch.ones(2, 64)}
    pruned = surgery.remove(finetuned.model, masks)
    export.save(pruned, finetuned.tokenizer, tmp_path / "prune" / "model")
    inputs = {"finetune": finetuned.artifact, "prune": artifact(tmp_path / "prune")}
    (tmp_path / "out").mkdir()
    figures = evaluate.run(Work("evaluate", finetuned.recipe, inputs, tmp_path / "out", tmp_path / "logs"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"] is None
    assert (report["task"]["split"], report["task"]["metric"]) == ("test", "accuracy")
    assert figures["test_accuracy_finetuned"] > 0.9
    assert figures["test_accuracy_finetuned"] >= figures["test_accuracy_pruned"]
    dense, small = report["models"]["fine-tuned"], report["models"]["pruned"]
    assert dense["encoder_parameters"] > small["encoder_parameters"]
    assert dense["parameters"] > small["parameters"] > small["encoder_parameters"]
    assert set(report["latency"]["milliseconds"]) == {"fine-tuned", "pruned"}
    assert figures["speed_up"] > 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md"]


def test_a_recipe_without_pruning_has_one_model(finetuned, tmp_path):
    recipe = finetuned.recipe.model_copy(update={"prune": None})
    figures = evaluate.run(Work("evaluate", recipe, {"finetune": finetuned.artifact}, tmp_path, tmp_path / "logs"))
    assert set(figures) == {"test_accuracy_finetuned"}
    assert "pruned" not in (tmp_path / "report.md").read_text()
