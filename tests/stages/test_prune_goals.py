"""What else can be asked of a pruning: several targets, other units, a speed-up, a shape, one shot, other teachers; and what cannot."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.artifacts import Artifact
from pipeline.compression import teachers
from pipeline.compression.latency import Table
from pipeline.compression.masks import Masks
from pipeline.errors import UserError
from pipeline.models import build, export
from pipeline.models.size import block_parameters
from pipeline.recipe import Recipe
from pipeline.stages import evaluate, prune
from pipeline.tasks import task as tasks
from pipeline.tasks.batches import TaskBatches
from pipeline.workflow import Work

ALL = ["attention", "feedforward", "heads", "neurons", "hidden"]
LAYERS = ALL[:4]


@pytest.fixture
def run(finetuned, tmp_path):
    """Prunes the toy model with these settings: (work, figures)."""

    def prune_with(artifact=None, epochs=3, unpadded=False, **settings):
        recipe = finetuned.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
        recipe["model"] |= {"unpadded": unpadded}
        recipe["prune"] |= {"epochs": epochs, "recovery": {"epochs": 1, "batch_size": 32, "lr": 1e-3}} | settings
        (tmp_path / "made").mkdir()
        work = Work("prune", Recipe.model_validate(recipe), {"finetune": artifact or finetuned.artifact}, tmp_path / "made", tmp_path / "logs")
        return work, prune.run(work)

    return prune_with


def sparsity(model, dense):
    return 1 - block_parameters(model.config) / block_parameters(dense.config)


@pytest.mark.parametrize(("expected", "told"), [(0.913, True), (0.945, False), (0.956, False), (0.98, True)])
def test_masks_that_end_off_their_target_are_told_of_by_what_they_keep(run, monkeypatch, capsys, expected, told):
    monkeypatch.setattr(Masks, "expected_sparsity", lambda masks: torch.tensor(expected))
    run(sparsity={"target": 0.95, "units": LAYERS}, epochs=1)
    assert (f"the masks ended at an expected sparsity of {expected:.3f}, the target is 0.95" in capsys.readouterr().out) == told


def test_several_targets_make_a_model_each_and_go_on_from_one_another(run, finetuned, tmp_path):
    work, figures = run(sparsity={"target": [0.4, 0.6, 0.8], "units": LAYERS}, epochs=4)
    made = {name: build.load(work.directory / "models" / name, head="classification") for name in ("0.4", "0.6", "0.8")}
    assert [sparsity(model, finetuned.model) for model in made.values()] == pytest.approx([0.4, 0.6, 0.8], abs=0.02)
    last = build.load(work.directory / "model", head="classification").state_dict()
    assert all(torch.equal(last[name], tensor) for name, tensor in made["0.8"].state_dict().items())
    entries = json.loads((work.directory / "structure.json").read_text())
    assert [entry["name"] for entry in entries] == ["0.4", "0.6", "0.8"]
    assert figures["realised_sparsity"] == pytest.approx(0.8, abs=0.02)
    assert figures["realised_sparsity_0.4"] == pytest.approx(0.4, abs=0.02)
    first = [json.loads((tmp_path / "logs" / name / "masking" / "metrics.jsonl").read_text().splitlines()[0]) for name in ("0.4", "0.6", "0.8")]
    risen = [row["side"]["target_sparsity"] for row in first]
    assert 0 <= risen[0] < 0.1
    assert risen[1:] == [0.4, 0.6]  # no steps that leave the student whole

    (tmp_path / "report").mkdir()
    pruned = Artifact(work.directory, finetuned.artifact.manifest)
    inputs = {"finetune": finetuned.artifact, "prune": pruned}
    reported = evaluate.run(Work("evaluate", work.recipe, inputs, tmp_path / "report", tmp_path / "logs"))
    assert {f"{what}_{name}" for what in ("test_accuracy_pruned", "speed_up") for name in ("0.4", "0.6", "0.8")} < set(reported)
    assert "pruned 0.6" in (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "report" / "trade_off.png").stat().st_size > 1000


@pytest.mark.parametrize("units", [ALL, ["attention", "feedforward"], ["hidden"], ["neurons", "hidden"], ["heads", "feedforward"]], ids=str)
def test_any_units_alone_or_together(run, finetuned, units):
    """The official code lacks a mask where layers or dimensions are left out."""
    target = 0.45
    work, figures = run(sparsity={"target": target, "units": units})
    found = build.load(work.directory / "model", head="classification")
    assert figures["realised_sparsity"] == pytest.approx(sparsity(found, finetuned.model), abs=1e-4)
    assert figures["realised_sparsity"] == pytest.approx(target, abs=0.03 if {"neurons", "hidden"} & set(units) else 0.2)
    assert (found.config.hidden_size < 32) == ("hidden" in units)
    assert figures["dev_accuracy_recovered"] > 0.8


@pytest.mark.parametrize("method", ["cofi", "one-shot"])
def test_a_speed_up_on_this_machine(run, monkeypatch, method):
    measure = Table.measure

    def as_of_another_machine(*arguments, **options):
        """What is measured differs from call to call."""
        table = measure(*arguments, **options)
        attention = tuple(bool(heads) * (0.2 + 0.2 * heads) for heads in table.heads)
        return replace(table, attention=(attention,), feedforward=(tuple(bool(count) * (0.2 + count / 80) for count in table.neurons),))

    monkeypatch.setattr(Table, "measure", as_of_another_machine)
    work, figures = run(method=method, sparsity={"speed_up": 2, "units": LAYERS, "timing": {"rows": 4, "length": 16, "threads": 1}})
    assert figures["target_speed_up"] == 2
    config, table = build.load(work.directory / "model", head="classification").config, Table.open(work.scratch / "latency.json")
    time = sum(table.attention[0][heads] for heads in config.heads_per_layer)
    time += np.interp(config.ffn_per_layer, table.neurons, table.feedforward[0]).sum()
    assert figures["predicted_speed_up"] == pytest.approx(table.dense / time, abs=0.01)  # whatever the masks' values
    assert 2 <= figures["predicted_speed_up"] < 2.4
    assert "expected_sparsity" not in figures


def test_a_shape_is_met_exactly_and_stock_classes_hold_it(run, finetuned):
    shape = {"layers": 1, "heads": 2, "ffn": 24, "hidden": 16}
    work, _ = run(sparsity={"shape": shape, "units": ALL})
    config = json.loads((work.directory / "model" / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert [config[name] for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size")] == list(shape.values())


def test_widths_are_multiples(run):
    work, _ = run(sparsity={"target": 0.6}, multiple_of=8)
    config = build.load(work.directory / "model", head="classification").config
    assert all(neurons % 8 == 0 for neurons in config.ffn_per_layer)


@pytest.mark.parametrize("goal", [{"target": [0.5, 0.7]}, {"shape": {"layers": 2, "heads": 2, "ffn": 24}}], ids=str)
def test_in_one_shot_nothing_is_trained_but_what_is_left(run, finetuned, goal):
    work, figures = run(method="one-shot", one_shot={"examples": 128}, sparsity=goal, onnx="shape" in goal)
    assert (work.directory / "model" / "model.onnx").is_file() == ("shape" in goal)
    assert not list(work.scratch.rglob("masking"))
    if "target" in goal:
        assert figures["realised_sparsity"] == pytest.approx(0.7, abs=0.02)
        assert figures["realised_sparsity_0.5"] == pytest.approx(0.5, abs=0.02)
    assert figures["dev_accuracy_recovered"] > 0.8


def test_a_smaller_student_begins_as_evenly_spaced_layers(run, finetuned):
    work, figures = run(method="student", sparsity={"shape": {"layers": 1, "heads": 2, "ffn": 24}}, distillation={"attention": 5.0})
    config = build.load(work.directory / "model", head="classification").config
    assert (config.heads_per_layer, config.ffn_per_layer) == ([2], [24])
    begun = build.load(work.scratch / "shape" / "removed", head="classification").base_model.layers[0].feed_forward.up.weight
    last = finetuned.model.base_model.layers[1].feed_forward.up.weight
    assert all((row == last).all(1).any() for row in begun)
    assert figures["realised_sparsity"] == pytest.approx(0.77, abs=0.05)
    assert figures["dev_accuracy_recovered"] > 0.8
    last = json.loads((work.logs / "shape" / "recovery" / "metrics.jsonl").read_text().splitlines()[-1])
    losses = last["losses"]
    assert losses["attention"] > 0
    assert {name: number for name, number in losses.items() if "matched" in name} == {"matched_2": 1}  # its one layer learns the last
    assert last["loss"] == pytest.approx(0.5 * losses["distill"] + 0.5 * losses["layers"] + 5 * losses["attention"])


def test_copies_of_the_examples_are_learnt_from_and_rank_nothing(run, finetuned, tmp_path):
    once = {"method": "one-shot", "one_shot": {"examples": 128}}
    work, figures = run(**once, distillation={"augment": 2})
    said = teachers.recorded(work.scratch / prune.SAID, prune._Pruning(work).rows(32), (0, 1))
    assert len(said._logits) == 3 * 512
    copies = tasks.open(work.scratch / prune.TEXTS).splits["train"]
    assert copies[:512] == finetuned.task.splits["train"]
    assert sum(a.text != b.text for a, b in zip(copies[512:1024], copies[:512], strict=True)) > 450
    tokens = finetuned.tokenizer(copies[700].text, return_tensors="pt")
    assert torch.allclose(said._logits[700], finetuned.model.eval()(**tokens).logits[0], atol=1e-4)
    records = (work.logs / "0.6" / "recovery" / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 3 * 512 // 32
    assert figures["dev_accuracy_recovered"] > 0.8
    (tmp_path / "made").rename(tmp_path / "with")
    without, _ = run(**once)
    kept = [load_file(directory / "scratch" / "0.6" / prune.REMOVED / prune.MASKS) for directory in (tmp_path / "with", without.directory)]
    assert all(torch.equal(kept[0][unit], kept[1][unit]) for unit in kept[1])


def test_a_black_box_teaches_by_its_outputs(run, finetuned, tmp_path):
    examples = finetuned.task.splits["train"]
    logits = [[3.0, -3.0] if example.label == 0 else [-3.0, 3.0] for example in examples]
    (tmp_path / "outputs.jsonl").write_text("\n".join(json.dumps({"logits": row}) for row in logits))
    _, figures = run(distillation={"teacher_outputs": str(tmp_path / "outputs.jsonl"), "layers": 0})
    assert figures["dev_accuracy_recovered"] > 0.8


def test_a_teacher_with_the_labels_in_another_order_is_refused(run, finetuned, tmp_path):
    export.save(finetuned.model, finetuned.tokenizer, tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"id2label": {"0": "good", "1": "bad"}}))
    with pytest.raises(UserError, match=r"its labels are good, bad, the task's bad, good, in this order"):
        run(distillation={"teacher": str(tmp_path / "teacher")})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logits": np.zeros((10, 2))}, r"logits of shape \[10, 2\], expected \[512, 2\]: one row for each training example"),
        ({"logits": np.zeros((512, 3))}, r"logits of shape \[512, 3\], expected \[512, 2\]"),
        ({"logits": np.full((512, 2), np.nan)}, "row 1 has a logit that is not finite"),
        ({"other": np.zeros(3)}, "expected an array `logits`"),
    ],
)
def test_outputs_that_do_not_fit_are_told(run, tmp_path, wrong, message):
    np.savez(tmp_path / "outputs.npz", **wrong)
    with pytest.raises(UserError, match=message):
        run(distillation={"teacher_outputs": str(tmp_path / "outputs.npz"), "layers": 0})


def test_a_file_of_outputs_that_was_cut_off_is_told(tmp_path):
    path = tmp_path / "outputs.npz"
    np.savez(path, logits=np.zeros((512, 2)))
    whole = path.read_bytes()
    for cut in (0, 300):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"outputs\.npz: not a teacher's outputs"):
            teachers.outputs(path, 512, 2)


def test_a_teacher_with_positions_for_less_than_a_row_is_refused(run, finetuned, tmp_path):
    short = copy.deepcopy(finetuned.model)
    short.base_model.embeddings.positions.table = torch.nn.Embedding(6, 32)
    short.config.max_position_embeddings = 6
    export.save(short, finetuned.tokenizer, tmp_path / "teacher")
    with pytest.raises(UserError, match="teacher: the model takes 6 tokens, rows have 16"):
        run(distillation={"teacher": str(tmp_path / "teacher")})


@pytest.mark.parametrize("method", ["cofi", "one-shot"])
def test_padding_is_left_out_where_the_recipe_says_so_and_directories_do_not(run, monkeypatch, method):
    trained, train = [], prune.train

    def spied(trainee, *arguments, **options):
        trained.append((trainee.model.config.unpadded, trainee.objective._beside[0].config.unpadded))
        return train(trainee, *arguments, **options)

    monkeypatch.setattr(prune, "train", spied)
    work, _ = run(method=method, epochs=1, unpadded=True, distillation={"record": 0})
    assert trained == [(True, True)] * (2 if method == "cofi" else 1)
    assert not build.load(work.directory / "model", head="classification").config.unpadded


def test_one_shot_ranks_the_same_examples_however_they_are_divided(finetuned):
    batches = TaskBatches(finetuned.task.splits["train"], finetuned.tokenizer, finetuned.task, 24, 1)
    for count, expected in ((100, 100), (10_000, 512)):
        found = np.concatenate([batch["example"] for batch in batches.first(count)])
        assert len(found) == len(set(found.tolist())) == expected
        others = TaskBatches(finetuned.task.splits["train"], finetuned.tokenizer, finetuned.task, 7, 1).first(count)
        assert np.array_equal(found, np.concatenate([batch["example"] for batch in others]))


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        (
            {"target": 0.6, "units": ["heads"]},
            "the target is 0.6; sparsity.units heads make at most 0.4981; lower the target, or add units",
        ),
        (
            {"speed_up": 50, "units": ["neurons"], "timing": {"length": 16}},
            "the target is a speed-up of 50; sparsity.units neurons make at most a speed-up of",
        ),
        ({"shape": {"layers": 1, "heads": 8, "ffn": 8}, "units": ALL}, "heads is 8, the model has 4"),
    ],
)
def test_what_units_cannot_reach_is_told_before_training(run, goal, message):
    with pytest.raises(UserError, match=message):
        run(sparsity=goal)


def test_an_empty_development_split_is_told(run, finetuned, tmp_path):
    task = replace(finetuned.task, splits={**finetuned.task.splits, "dev": []})
    export.save(finetuned.model, finetuned.tokenizer, tmp_path / "artifact" / "model")
    task.save(tmp_path / "artifact" / "task.json")
    with pytest.raises(UserError, match="the development split is empty"):
        run(artifact=Artifact(tmp_path / "artifact", finetuned.artifact.manifest))
