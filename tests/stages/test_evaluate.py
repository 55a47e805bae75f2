import json
import shutil

import numpy as np
import pytest
import torch

from pipeline.artifacts import Artifact
from pipeline.compression import surgery
from pipeline.corpus.store import Store, Writer
from pipeline.errors import UserError
from pipeline.memory.datastore import Datastore
from pipeline.models import build, export
from pipeline.models.settings import ModelSettings
from pipeline.packing import plan as plans
from pipeline.packing.settings import PackSettings
from pipeline.recipe import Recipe
from pipeline.stages import evaluate, index
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


@pytest.mark.parametrize(("objective", "head"), [("electra", "none"), ("meta_controller", "mlm")])
def test_a_model_that_learned_on_replaced_tokens_is_reported_without_a_loss(objective, head, finetuned, tmp_path):
    recipe, inputs, _ = language_model(tmp_path, finetuned.tokenizer, "encoder")
    recipe["pretrain"]["objective"]["name"] = objective
    model = build.new(ModelSettings.model_validate(recipe["model"]), finetuned.tokenizer, head)
    shutil.rmtree(tmp_path / "pretrain")
    export.save(model, finetuned.tokenizer, tmp_path / "pretrain" / "model")
    (tmp_path / "out").mkdir()
    assert evaluate.run(Work("evaluate", Recipe.model_validate(recipe), inputs, tmp_path / "out", tmp_path / "logs")) == {}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"] is None
    assert report["models"]["pretrained"]["encoder_parameters"] > 0
    assert "perplexity" not in (tmp_path / "out" / "report.md").read_text()


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md", "trade_off.png"]


def test_a_recipe_without_pruning_has_one_model(finetuned, tmp_path):
    recipe = finetuned.recipe.model_copy(update={"prune": None})
    figures = evaluate.run(Work("evaluate", recipe, {"finetune": finetuned.artifact}, tmp_path, tmp_path / "logs"))
    assert set(figures) == {"test_accuracy_finetuned"}
    assert "pruned" not in (tmp_path / "report.md").read_text()


MEMORIES = ["none", "local+long", "local+external", "knn+cache"]


def with_datastore(directory, tokenizer, index_settings=None, **evaluate_settings):
    """A causal recipe with a datastore of its training documents, which are its held-out ones."""
    recipe, inputs, _ = language_model(directory, tokenizer, "decoder")
    shutil.copytree(directory / "tokenize" / "valid", directory / "tokenize" / "train")
    recipe |= {
        "index": index_settings or {},
        "evaluate": {"batch_size": 4, "memory": MEMORIES, "long": {"size": 20}, "external": {"k": [1, 4]}} | evaluate_settings,
    }
    (directory / "index").mkdir()
    work = Work("index", Recipe.model_validate(recipe), inputs, directory / "index", directory / "logs")
    return recipe, inputs | {"index": artifact(directory / "index", **index.run(work))}


def test_a_causal_model_is_scored_with_each_memory(finetuned, tmp_path):
    recipe, inputs = with_datastore(tmp_path, finetuned.tokenizer, within_documents=True)  # as they were indexed
    (tmp_path / "out").mkdir()
    work = Work("evaluate", Recipe.model_validate(recipe), inputs, tmp_path / "out", tmp_path / "logs")
    figures = evaluate.run(work)
    memories = json.loads((tmp_path / "out" / "report.json").read_text())["memories"]
    names = [*MEMORIES[:3], "local+external, interpolated", MEMORIES[3]]
    rows = {row["memory"]: row for row in memories["rows"]}
    assert list(rows) == names
    assert memories["window"] == {"block": 6, "context": 6}
    assert rows["knn+cache"]["perplexity"] < 8 < 15 < rows["none"]["perplexity"]  # the store has these very texts
    assert figures["perplexity_local_external_interpolated"] == round(rows["local+external, interpolated"]["perplexity"], 3)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Memories" in text
    assert all(f"| {name} |" in text for name in names)
    assert list((tmp_path / "out" / "scratch" / "memories").iterdir())  # measured pieces, until it is published


def test_the_search_visits_as_many_lists_as_the_settings_say(finetuned, tmp_path, monkeypatch):
    visited, search = set(), Datastore.search
    monkeypatch.setattr(Datastore, "search", lambda self, *given, **named: visited.add(self.probe) or search(self, *given, **named))
    recipe, inputs = with_datastore(tmp_path, finetuned.tokenizer, memory=["external"], external={"k": [4], "probe": 5})
    (tmp_path / "out").mkdir()
    evaluate.run(Work("evaluate", Recipe.model_validate(recipe), inputs, tmp_path / "out", tmp_path / "logs"))
    assert visited == {5}


def test_the_datastore_of_another_run_is_read_and_one_of_another_model_is_refused(finetuned, tmp_path):
    recipe, inputs = with_datastore(tmp_path / "one", finetuned.tokenizer)
    del recipe["index"]
    recipe["evaluate"]["datastore"] = str(inputs.pop("index").path)
    (tmp_path / "out").mkdir()
    evaluate.run(Work("evaluate", Recipe.model_validate(recipe), inputs, tmp_path / "out", tmp_path / "logs"))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["memories"]["within_documents"] is False  # rows run over their ends
    torch.manual_seed(5)
    other = build.new(ModelSettings.model_validate(recipe["model"]), finetuned.tokenizer)
    export.save(other, finetuned.tokenizer, tmp_path / "other" / "model")
    with pytest.raises(UserError, match=r"datastore\.json.*made with model"):
        evaluate.run(
            Work("evaluate", Recipe.model_validate(recipe), inputs | {"pretrain": artifact(tmp_path / "other")}, tmp_path / "out", tmp_path / "logs")
        )


def encoder_of(directory, tokenizer, length):
    torch.manual_seed(7)
    settings = ModelSettings(kind="decoder", layers=1, hidden=8, heads=2, ffn=16, max_length=length, init_std=0.3)
    export.save(build.new(settings, tokenizer), tokenizer, directory)
    return {"encoder": str(directory)}


def test_the_datastore_is_asked_by_the_smaller_model_that_made_its_keys(finetuned, tmp_path):
    encoder = encoder_of(tmp_path / "encoder", finetuned.tokenizer, 16)
    recipe, inputs = with_datastore(tmp_path, finetuned.tokenizer, encoder, memory=["none", "knn"], within_documents=True)
    (tmp_path / "out").mkdir()
    figures = evaluate.run(Work("evaluate", Recipe.model_validate(recipe), inputs, tmp_path / "out", tmp_path / "logs"))
    assert figures["perplexity_knn"] < 8 < 15 < figures["perplexity_none"]
    shutil.rmtree(tmp_path / "encoder")
    encoder_of(tmp_path / "encoder", finetuned.tokenizer, 8)
    with pytest.raises(UserError, match=r"datastore\.json.*made with model"):
        evaluate.run(Work("evaluate", Recipe.model_validate(recipe), inputs, tmp_path / "out", tmp_path / "logs"))


def test_a_model_somebody_else_made_is_scored_without_pretraining(finetuned, tmp_path):
    recipe, inputs, _ = language_model(tmp_path, finetuned.tokenizer, "decoder")
    del recipe["pretrain"], recipe["pack"]
    recipe["model"] = {"from": str(inputs.pop("pretrain").path / "model"), "kind": "decoder"}
    recipe["evaluate"] = {"memory": "local", "window": {"block": 5, "context": 3}}
    (tmp_path / "out").mkdir()
    evaluate.run(Work("evaluate", Recipe.model_validate(recipe), {"tokenize": inputs["tokenize"]}, tmp_path / "out", tmp_path / "logs"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"] is None
    assert report["memories"]["within_documents"] is True
    assert [row["memory"] for row in report["memories"]["rows"]] == ["local"]


def test_a_model_trained_with_memory_has_its_perplexity_without(finetuned, tmp_path):
    recipe, inputs, _ = language_model(tmp_path, finetuned.tokenizer, "decoder")
    found = []
    for name in ("causal", "trimelm"):
        recipe["pretrain"]["objective"] = {"name": name}
        (tmp_path / name).mkdir()
        evaluate.run(Work("evaluate", Recipe.model_validate(recipe), inputs, tmp_path / name, tmp_path / "logs"))
        found.append(json.loads((tmp_path / name / "report.json").read_text())["held_out"])
    assert found[0] | {"objective": "trimelm"} == found[1]
    assert "segments, without memory." in (tmp_path / "trimelm" / "report.md").read_text()
