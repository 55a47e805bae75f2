import math

import pytest
import torch

from pipeline.compression import surgery
from pipeline.compression.distillation import Distillation, output_loss, prediction_loss
from pipeline.compression.layer_distillation import LayerDistillation, layers_left, match, teacher_layers
from pipeline.compression.masks import Masks
from pipeline.compression.settings import DistillationSettings, SparsitySettings
from pipeline.compression.sparsity import Prunable
from pipeline.compression.teachers import Recorded
from pipeline.models.modeling_trimline import TrimlineForQuestionAnswering
from pipeline.objectives.base import Trainee
from pipeline.objectives.span import Span


def batch(labels):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 50, (len(labels), 9), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": torch.tensor(labels)}


def test_the_prediction_loss_is_the_hand_computed_one():
    student, teacher, temperature = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 2.0
    t = math.e / (math.e + 1)  # softmax of (1, 0)
    first = t * math.log(t / (1 - t)) + (1 - t) * math.log((1 - t) / t)  # the second row agrees: no divergence
    assert prediction_loss(student, teacher, temperature).item() == pytest.approx(temperature**2 * first / 2, abs=1e-6)


def test_the_prediction_loss_does_not_see_a_constant_added_to_logits_and_is_fp32():
    student, teacher = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    loss = prediction_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert prediction_loss(student.float() + 5, teacher.float() - 3, 2.0).item() == pytest.approx(loss.item(), abs=1e-5)


def test_the_output_loss_is_the_mean_square():
    assert output_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [4.0]])).item() == pytest.approx(2.5)


def test_padding_is_no_choice_of_an_answers_token():
    student, teacher = torch.randn(2, 6), torch.randn(2, 6)
    real = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0]])
    for temperature in (0.5, 2.0):
        found = prediction_loss(student, teacher, temperature, real)
        assert found.item() == pytest.approx(prediction_loss(student[:, :4], teacher[:, :4], temperature).item(), abs=1e-6)


def test_answers_learn_the_mean_of_start_and_end(encoder):
    teacher, student = (encoder(kind=TrimlineForQuestionAnswering, seed=seed) for seed in (1, 2))
    data = batch([0, 1]) | {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])}
    data["attention_mask"][1, 6:] = 0
    objective = Distillation(teacher, DistillationSettings(layers=0, hard_labels=1.0))
    losses = objective(student, data, 0)
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = student(**inputs), teacher(**inputs)
    sides = [
        prediction_loss(one.masked_fill(data["attention_mask"] == 0, -1e9), other.masked_fill(data["attention_mask"] == 0, -1e9), 2.0)
        for one, other in ((ours.start_logits, theirs.start_logits), (ours.end_logits, theirs.end_logits))
    ]
    assert losses["distill"].item() == pytest.approx(sum(sides).item() / 2, rel=1e-5)
    assert losses["hard"].item() == pytest.approx(Span()(student, data, 0)["span"].item(), rel=1e-6)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_but_the_labels(encoder):
    objective = Distillation(encoder(), DistillationSettings(layers=0, hard_labels=0.5))
    losses = objective(encoder(), batch([0, 1, 2]), 0)
    assert losses["distill"].item() == pytest.approx(0, abs=1e-6)
    assert losses["hard"].item() > 0.1
    assert set(losses) == set(objective.targets(batch([0, 1, 2]))) == {"distill", "hard"}


def test_a_regression_learns_its_teachers_numbers(encoder):
    teacher, student = encoder(labels=1, seed=1), encoder(labels=1)
    data = batch([0.5, 2.0])
    losses = Distillation(teacher, DistillationSettings(layers=0, hard_labels=1.0))(student, data, 0)
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = student(**inputs).logits[:, 0], teacher(**inputs).logits[:, 0]
    assert losses["distill"].item() == pytest.approx((ours - theirs).square().mean().item(), rel=1e-5)
    assert losses["hard"].item() == pytest.approx((ours - data["labels"]).square().mean().item(), rel=1e-5)


def test_the_teacher_is_neither_trained_nor_saved_with_the_student_and_draws_no_dropout(encoder):
    teacher, student = encoder(dropout=0.5, seed=1).train(), encoder()
    trainee = Trainee(student, Distillation(teacher, DistillationSettings(layers=0)))
    trainee.train()
    assert not teacher.training
    assert {id(p) for p in trainee.parameters()} == {id(p) for p in student.parameters()}
    trainee(batch([0, 1, 2]), 0)["distill"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.model.layers.parameters())


def test_masks_enter_the_student_and_learn_from_both_losses(encoder):
    masks = Masks(Prunable(3, 32, 4, 48), SparsitySettings(prepruning_ratio=0.1, warmup_ratio=0.2), target=0.6, steps=10, seed=1)
    student = encoder()
    objective = Distillation(encoder(seed=1), DistillationSettings(layers=0), masks)
    assert objective.targets(batch([0, 1]))["sparsity"] == 2
    masks.before_step(0)
    assert objective(student, batch([0, 1]), 0)["sparsity"].item() == 0
    masks.before_step(5)
    losses = objective(student, batch([0, 1]), 5)
    (losses["distill"]).backward()
    from_task = masks.units["neurons"].log_alpha.grad.clone()
    assert from_task.abs().sum() > 0
    assert masks.lagrangians["all"].multipliers.grad is None
    losses["sparsity"].backward()
    assert (masks.units["neurons"].log_alpha.grad != from_task).any()
    assert masks.lagrangians["all"].multipliers.grad is not None


def test_micro_batches_add_up_to_the_whole_batch(encoder):
    """Masks are drawn once a step, so that accumulated gradients are those of the batch taken at once."""
    whole = batch([0, 1, 2, 1])
    gradients = []
    for parts in ([whole], [{name: tensor[:3] for name, tensor in whole.items()}, {name: tensor[3:] for name, tensor in whole.items()}]):
        masks = Masks(Prunable(3, 32, 4, 48), SparsitySettings(prepruning_ratio=0), target=0.6, steps=10, seed=1)
        objective = Distillation(encoder(seed=1), DistillationSettings(layers=0), masks)
        masks.before_step(7)
        student = encoder()
        for part in parts:
            losses, targets = objective(student, part, 7), objective.targets(part)
            sum(losses[name] * targets[name] / 4 for name in losses).backward()
        gradients.append([p.grad.clone() for p in [*masks.parameters(), student.classifier.weight]])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_black_box_is_learnt_by_the_rows_numbers(encoder):
    teacher, student, data = encoder(seed=1), encoder(), batch([0, 1])
    outputs = torch.zeros(5, 3)
    outputs[[4, 2]] = teacher(data["input_ids"], data["attention_mask"]).logits.detach()
    settings = DistillationSettings(layers=0)
    found = Distillation(Recorded(outputs), settings)(student, data | {"example": torch.tensor([4, 2])}, 0)
    assert found["distill"].item() == pytest.approx(Distillation(teacher, settings)(student, data, 0)["distill"].item(), rel=1e-5)


def test_the_layers_taught_are_evenly_spaced_up_to_the_last():
    assert [teacher_layers(layers) for layers in (12, 24, 6, 4, 2)] == [(2, 5, 8, 11), (5, 11, 17, 23), (1, 2, 4, 5), (0, 1, 2, 3), (0, 1)]


DISTANCES = torch.full((4, 12), 50.0) + torch.arange(12)
for row, nearest in enumerate(([9], [0, 2], [6, 0, 2], [4])):
    DISTANCES[row, nearest] = torch.arange(len(nearest)).float()
ALL, ALTERNATE, ONLY_FIRST, NONE = torch.ones(12).bool(), torch.arange(12) % 2 == 0, torch.arange(12) == 0, torch.zeros(12).bool()


@pytest.mark.parametrize(
    ("rule", "alive", "expected"),
    [
        ("free", ALL, [9, 0, 6, 4]),
        ("ordered", ALL, [0, 0, 0, 4]),
        ("ordered_as_coded", ALL, [0, 0, 0, 4]),
        ("ordered", ALTERNATE, [0, 0, 0, 4]),
        ("ordered_as_coded", ALTERNATE, [0, 0, 2, 4]),
        ("ordered", ONLY_FIRST, [0, 0, 0, 0]),
        ("ordered_as_coded", ONLY_FIRST, [0, 0, 4, 4]),
        ("ordered", NONE, [11, 11, 11, 11]),
        ("ordered_as_coded", NONE, [11, 11, 11, 11]),
    ],
)
def test_layers_are_matched_as_intended_and_as_coded(rule, alive, expected):
    """The cases of the original code's runs: it asks whether the layer of that rank in distance lives, and so takes the dead layer 4, or passes the
    living 0 over; where all layers are dead it fails."""
    assert match(DISTANCES, rule, alive).tolist() == expected


@pytest.mark.parametrize(
    ("left", "taught", "learning"),
    [
        ([True] * 12, (2, 5, 8, 11), (2, 5, 8, 11)),
        ([True] * 2, (5, 11), (0, 1)),
        ([True, False, False, False, True, False, False, False, False, True, False, False], (5, 8, 11), (0, 4, 9)),
        ([False, True, True, True, False, True, False, True], (2, 5, 8, 11), (2, 3, 5, 7)),
        ([False, True, False], (11,), (1,)),
        ([False, False], (11,), (1,)),
    ],
)
def test_what_is_left_learns_one_for_one_and_the_last_from_the_last(left, taught, learning):
    module = LayerDistillation((2, 5, 8, 11), 4, rule="fixed", left=left)
    assert (module.taught, module.learners) == (taught, learning)
    teacher, student = states(1, layers=12), states(2, layers=len(left))
    loss, matched = module(teacher, student, torch.ones(2, 5))
    assert matched.tolist() == list(learning)
    expected = sum((teacher[a] - student[j]).square().mean() for a, j in zip(taught, learning, strict=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_layers_without_head_and_neuron_are_not_left(encoder):
    masks = {"heads": torch.ones(3, 4), "neurons": torch.ones(3, 48)}
    masks["heads"][[0, 1]] = 0
    masks["neurons"][[1, 2]] = 0
    assert layers_left(surgery.remove(encoder(), masks).config) == [True, False, True]


def states(seed, layers=3, rows=2, length=5, width=4):
    return torch.randn(layers, rows, length, width, generator=torch.Generator().manual_seed(seed))


def test_the_layer_loss_is_a_sum_of_means_over_tokens_and_leaves_padding_out():
    teacher, student, real = states(1), states(2), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    module = LayerDistillation((0, 2), 4, rule="free")
    loss, matched = module(teacher, student, real)
    distances = [[(goal[real == 1] - state[real == 1]).square().mean() for state in student] for goal in (teacher[0], teacher[2])]
    assert matched.tolist() == [int(torch.stack(row).argmin()) for row in distances]
    assert loss.item() == pytest.approx(sum(min(row) for row in distances).item(), rel=1e-5)
    garbage = [torch.where(real[:, :, None] == 1, side, 1e3) for side in (teacher, student)]
    assert module(*garbage, real)[0].item() == loss.item()


def test_gradient_flows_through_the_matched_layers_alone_and_trains_the_map():
    student = states(2).requires_grad_()
    module = LayerDistillation((0, 2), 4, rule="free")
    loss, matched = module(states(1), student, torch.ones(2, 5))
    loss.backward()
    assert [bool(gradient.any()) for gradient in student.grad] == [layer in matched.tolist() for layer in range(3)]
    assert module.transform.weight.grad.abs().sum() > 0


def test_a_narrower_student_starts_from_the_dimensions_it_has_left():
    teacher, kept = states(1), torch.tensor([0, 3])
    loss, _ = LayerDistillation((2,), 4, rule="fixed", left=[True] * 3, kept=kept)(teacher, teacher[..., kept], torch.ones(2, 5))
    assert loss.item() == pytest.approx(teacher[2][..., [1, 2]].square().mean().item() / 2, rel=1e-5)


def test_hidden_states_are_learnt_with_the_students_rate_from_layers_that_live(encoder):
    """W is a parameter of the trainee; which layers live is asked of this step's masks and of the student's own shape."""
    masks = Masks(Prunable(3, 32, 4, 48), SparsitySettings(units=("attention", "feedforward"), prepruning_ratio=0), target=0.6, steps=10, seed=1)
    with torch.no_grad():
        for gate in masks.units.values():
            gate.log_alpha.copy_(torch.tensor([-20.0, 20.0, -20.0]))
    objective = Distillation(encoder(seed=1), DistillationSettings(), masks, LayerDistillation((0, 1, 2), 32))
    trainee = Trainee(encoder(), objective, side=masks)
    assert {"objective.layers.transform.weight", "objective.layers.transform.bias"} < {name for name, _ in trainee.named_parameters()}
    losses = trainee(batch([0, 1]), 0)
    assert [losses[f"matched_{layer}"].item() for layer in (1, 2, 3)] == [2, 2, 2]
    assert trainee.figures == {"matched_1", "matched_2", "matched_3"}
    assert objective.loss_weights == {"distill": 0.5, "layers": 0.5, "sparsity": 1.0}
    padded = batch([0, 1])
    padded["attention_mask"][0, 5:] = 0
    assert set(objective.targets(padded)) == set(losses)
    assert (objective.targets(padded)["layers"], objective.targets(padded)["distill"]) == (14, 2)


def test_a_student_all_of_whose_layers_are_dead_can_be_trained_on(encoder):
    masks = Masks(Prunable(3, 32, 4, 48), SparsitySettings(units=("heads", "neurons"), prepruning_ratio=0), target=0.6, steps=10, seed=1)
    with torch.no_grad():
        for mask in masks.units.values():
            mask.log_alpha.fill_(-20)
    losses = Distillation(encoder(seed=1), DistillationSettings(), masks, LayerDistillation((0, 1, 2), 32))(encoder(), batch([0, 1]), 0)
    losses["layers"].backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
