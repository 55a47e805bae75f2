"""Distillation on a plan's text, and masks on a pretraining objective."""

import copy

import pytest
import torch
import torch.nn.functional as F

from pipeline import objectives
from pipeline.compression.general import GeneralDistillation, Upstream
from pipeline.compression.masks import Masks
from pipeline.compression.settings import SparsitySettings
from pipeline.compression.sparsity import Prunable
from pipeline.compression.student import student
from pipeline.models.modeling_trimline import TrimlineForCausalLM, TrimlineForMaskedLM
from pipeline.objectives.base import Trainee
from pipeline.objectives.causal import Causal
from pipeline.objectives.mlm import Mlm
from pipeline.objectives.settings import DistillSettings, MlmSettings, StudentSettings


@pytest.fixture
def batch():
    """Rows of 12, 9 and 0 tokens."""
    mask = (torch.arange(12) < torch.tensor([[12], [9], [0]])).long()
    ids = torch.randint(5, 50, (3, 12), generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask, "segment": torch.tensor([4, 7, -1])}


def test_the_losses_are_those_of_a_loop_over_tokens(encoder, tokenizer, batch):
    teacher = encoder(kind=TrimlineForMaskedLM, seed=1)
    smaller = student(teacher, StudentSettings(layers=2, heads=2, ffn=16))
    objective = GeneralDistillation(DistillSettings(hard_labels=0.5, mask_rate=0.3, temperature=3.0), tokenizer, 1, teacher)
    prepared = objective.prepare(batch, 2)
    losses, counts = objective(smaller, prepared, 2), objective.targets(prepared)
    inputs = {name: prepared[name] for name in ("input_ids", "attention_mask")}
    made, goal = (model(**inputs, output_hidden_states=True) for model in (smaller, teacher))
    places = [tuple(place) for place in (prepared["labels"] != -100).nonzero().tolist()]
    soft = sum(F.softmax(goal.logits[p] / 3, -1) @ (F.log_softmax(goal.logits[p] / 3, -1) - F.log_softmax(made.logits[p] / 3, -1)) for p in places)
    hard = sum(-F.log_softmax(made.logits[p], -1)[prepared["labels"][p]] for p in places)
    layers = 0.0
    for ours, theirs in ((0, 0), (1, 2), (2, 3)):  # embeddings, then the second and the third of the teacher's layers
        real = [(row, place) for row, place in batch["attention_mask"].nonzero().tolist()]
        layers += sum((made.hidden_states[ours][p] - goal.hidden_states[theirs][p]).square().mean() for p in real) / len(real)
    expected = {"distill": 9 * soft / len(places), "mlm": hard / len(places), "layers": layers}
    assert losses.keys() == counts.keys() == expected.keys() == objective.loss_weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-4, rtol=1e-4)
    assert (counts["distill"], counts["layers"]) == (len(places), 21)


def test_a_batch_without_tokens_has_losses_of_zero(encoder, tokenizer, batch):
    teacher = encoder(kind=TrimlineForMaskedLM)
    objective = GeneralDistillation(DistillSettings(layers=0), tokenizer, 1, teacher)
    empty = objective.prepare({name: tensor[2:] for name, tensor in batch.items()}, 0)
    assert {name: loss.item() for name, loss in objective(copy.deepcopy(teacher), empty, 0).items()} == {"distill": 0, "mlm": 0}
    assert objective.figures == {"mlm"}


def test_held_out_text_is_scored_without_the_teacher_by_the_same_hidden_tokens(encoder, tokenizer, batch):
    settings, teacher = DistillSettings(mask_rate=0.3), encoder(kind=TrimlineForMaskedLM)
    alone, taught = objectives.build(settings, tokenizer, 1), GeneralDistillation(settings, tokenizer, 1, encoder(kind=TrimlineForMaskedLM))
    prepared = alone.prepare(batch, 2)
    assert torch.equal(prepared["labels"], taught.prepare(batch, 2)["labels"])
    assert alone(teacher, prepared, 2)["mlm"].item() == taught(teacher, prepared, 2)["mlm"].item()


def test_a_student_learns_its_teacher_which_stays_as_it_is(encoder, tokenizer, batch):
    teacher = encoder(kind=TrimlineForMaskedLM)
    before = copy.deepcopy(teacher.state_dict())
    smaller = student(teacher, StudentSettings(layers=1, heads=4, ffn=48))
    objective = GeneralDistillation(DistillSettings(mask_rate=0.3), tokenizer, 1, teacher)
    trainee = Trainee(smaller, objective)
    assert {id(parameter) for parameter in trainee.parameters()} == {id(parameter) for parameter in smaller.parameters()}
    optimizer, found = torch.optim.Adam(trainee.parameters(), lr=3e-3), []
    prepared = trainee.prepare(batch, 0)
    for _ in range(60):
        losses = trainee(prepared, 0)
        (losses["distill"] + losses["layers"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: loss.item() for name, loss in losses.items()})
    assert found[-1]["distill"] < found[0]["distill"] / 4
    assert found[-1]["layers"] < found[0]["layers"] / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("kind", [TrimlineForMaskedLM, TrimlineForCausalLM])
def test_masks_enter_a_pretraining_objective_and_learn_from_it(encoder, tokenizer, batch, kind):
    model = encoder("pre", kind=kind)
    units = ("heads", "neurons", "attention", "feedforward", "hidden")
    masks = Masks(Prunable.of(model.config), SparsitySettings(units=units, prepruning_ratio=0.2), target=0.5, steps=10, seed=1)
    inner = Mlm(MlmSettings(), tokenizer, 1) if kind is TrimlineForMaskedLM else Causal()
    objective = Upstream(inner, masks)
    prepared, name = objective.prepare(batch, 5), "mlm" if kind is TrimlineForMaskedLM else "causal"
    masks.before_step(1)
    assert objective(model, prepared, 1)["sparsity"].item() == 0
    assert objective(model, prepared, 1)[name].item() == pytest.approx(inner(model, prepared, 1)[name].item())
    masks.before_step(5)
    losses = objective(model, prepared, 5)
    assert losses[name].item() != pytest.approx(inner(model, prepared, 5)[name].item(), abs=1e-3)
    assert objective.targets(prepared).keys() == losses.keys() == {name, "sparsity"}
    losses[name].backward()
    assert all(masks.units[unit].log_alpha.grad.abs().sum() > 0 for unit in ("heads", "neurons"))
