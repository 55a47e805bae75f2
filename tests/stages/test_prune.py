import json
import shutil

import pytest
import torch

from pipeline.artifacts import Artifact
from pipeline.compression import teachers
from pipeline.errors import UserError
from pipeline.models import build
from pipeline.models.size import block_parameters
from pipeline.stages import prune
from pipeline.tasks.batches import TaskBatches
from pipeline.workflow import Work


@pytest.fixture(scope="module")
def pruned(finetuned, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prune")
    (directory / "artifact").mkdir()
    work = Work("prune", finetuned.recipe, {"finetune": finetuned.artifact}, directory / "artifact", directory / "logs")
    return work, prune.run(work)


def test_the_target_is_met_in_the_model_and_the_score_is_kept(finetuned, pruned):
    work, figures = pruned
    model = build.load(work.directory / "model", head="classification")
    assert 1 - block_parameters(model.config) / block_parameters(finetuned.model.config) == pytest.approx(0.6, abs=0.01)
    assert figures["realised_sparsity"] == pytest.approx(0.6, abs=0.01)
    assert figures["expected_sparsity"] == pytest.approx(0.6, abs=0.06)
    assert figures["dev_accuracy_teacher"] > 0.9
    assert figures["dev_accuracy_recovered"] > figures["dev_accuracy_teacher"] - 0.04


def test_the_model_and_its_structure_are_all_that_is_published(pruned):
    work, figures = pruned
    assert sorted(path.name for path in work.directory.iterdir()) == ["model", "scratch", "structure-0.6.png", "structure.json"]
    (structure,) = json.loads((work.directory / "structure.json").read_text())
    config = build.load(work.directory / "model", head="classification").config
    assert [(row["heads"], row["neurons"]) for row in structure["layers"]] == list(zip(config.heads_per_layer, config.ffn_per_layer, strict=True))
    assert structure["figures"]["realised_sparsity"] == figures["realised_sparsity"]
    assert json.dumps(figures)


def test_labels_and_tokenizer_travel_with_the_model(finetuned, pruned):
    work, _ = pruned
    assert build.load(work.directory / "model", head="classification").config.id2label == {0: "bad", 1: "good"}
    assert (work.directory / "model" / "tokenizer.json").is_file()


def test_what_the_teacher_says_is_written_down_once_as_it_would_say_it(finetuned, pruned):
    work, _ = pruned
    rows = TaskBatches(finetuned.task.splits["train"], finetuned.tokenizer, finetuned.task, 32, seed=1)
    recorded = teachers.recorded(work.scratch / "teacher", rows, (0, 1))
    batch = {name: torch.from_numpy(array) for name, array in rows.batch(3).items()}
    with torch.no_grad():
        said = finetuned.model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    found = recorded.outputs(batch["example"], batch["attention_mask"])
    torch.testing.assert_close(found["logits"], said.logits, atol=1e-5, rtol=1e-5)
    real = batch["attention_mask"].bool()
    for mine, theirs in zip(found["hidden_states"][1:], said.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine[real], theirs[real], atol=2e-3, rtol=1e-3)


def test_a_teacher_too_large_to_write_down_runs_and_frozen_embeddings_stay(finetuned, pruned, tmp_path, capsys):
    settings, frozen = finetuned.recipe.prune, {"freeze_embeddings": True}
    parts = {"distillation": settings.distillation.model_copy(update={"record": 0.0}), "recovery": settings.recovery.model_copy(update=frozen)}
    recipe = finetuned.recipe.model_copy(update={"prune": settings.model_copy(update=parts | frozen)})
    work = Work("prune", recipe, {"finetune": finetuned.artifact}, tmp_path, tmp_path / "logs")
    figures = prune.run(work)
    assert not (work.scratch / "teacher").exists()
    assert "more than distillation.record, 0: it runs in every step" in capsys.readouterr().out
    before, after = (model.get_input_embeddings().weight for model in (finetuned.model, build.load(tmp_path / "model", head="classification")))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert figures["dev_accuracy_recovered"] > figures["dev_accuracy_teacher"] - 0.05
    trained = build.load(pruned[0].directory / "model", head="classification").get_input_embeddings().weight
    assert not torch.equal(trained, before)


def test_the_constraint_can_be_watched(pruned):
    work, _ = pruned
    lines = [json.loads(line) for line in (work.logs / "0.6" / "masking" / "metrics.jsonl").read_text().splitlines()]
    side = lines[-1]["side"]
    alive = {f"{unit}_alive" for unit in ("heads", "neurons", "attention", "feedforward")}
    alive |= {f"{sublayer}_alive_{layer}" for sublayer in ("attention", "feedforward") for layer in (1, 2)}
    multipliers = {f"lambda_{number}_{part}" for number in (1, 2) for part in ("heads", "neurons")}
    assert {"expected_sparsity", "realised_sparsity", "target_sparsity", *multipliers, *alive} == set(side)
    assert side["target_sparsity"] == 0.6
    assert {"distill", "layers", "hard", "sparsity", "matched_1", "matched_2"} == set(lines[-1]["losses"])
    assert (work.logs / "0.6" / "recovery" / "metrics.jsonl").is_file()


def test_killed_in_the_recovery_it_resumes_to_the_same_model(finetuned, pruned, tmp_path, monkeypatch):
    work = Work("prune", finetuned.recipe, {"finetune": finetuned.artifact}, tmp_path, tmp_path / "logs")
    train = prune.train

    def killed(*arguments, **options):
        if options["title"].endswith("recovery"):
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(prune, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        prune.run(work)
    monkeypatch.setattr(prune, "train", train)
    figures = prune.run(work)
    before, figures_before = pruned
    assert figures == figures_before
    once, twice = (build.load(directory / "model", head="classification").state_dict() for directory in (before.directory, tmp_path))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_model_that_was_pruned_before_is_refused(finetuned, pruned, tmp_path):
    shutil.copytree(pruned[0].directory / "model", tmp_path / "pruned" / "model")
    finetuned.task.save(tmp_path / "pruned" / "task.json")
    artifact = Artifact(tmp_path / "pruned", finetuned.artifact.manifest)
    with pytest.raises(UserError, match="pruned before"):
        prune.run(Work("prune", finetuned.recipe, {"finetune": artifact}, tmp_path / "work", tmp_path / "logs"))
