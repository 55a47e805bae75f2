import math

import pytest
import torch

from pipeline.compression.distillation import Distillation, output_loss, prediction_loss
from pipeline.compression.masks import Masks
from pipeline.compression.settings import DistillationSettings, SparsitySettings
from pipeline.compression.sparsity import Prunable
from pipeline.objectives.base import Trainee


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


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_but_the_labels(encoder):
    objective = Distillation(encoder(), DistillationSettings(hard_labels=0.5))
    losses = objective(encoder(), batch([0, 1, 2]), 0)
    assert losses["distill"].item() == pytest.approx(0, abs=1e-6)
    assert losses["hard"].item() > 0.1
    assert set(losses) == set(objective.targets(batch([0, 1, 2]))) == {"distill", "hard"}


def test_a_regression_learns_its_teachers_numbers(encoder):
    teacher, student = encoder(labels=1, seed=1), encoder(labels=1)
    data = batch([0.5, 2.0])
    losses = Distillation(teacher, DistillationSettings(hard_labels=1.0))(student, data, 0)
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = student(**inputs).logits[:, 0], teacher(**inputs).logits[:, 0]
    assert losses["distill"].item() == pytest.approx((ours - theirs).square().mean().item(), rel=1e-5)
    assert losses["hard"].item() == pytest.approx((ours - data["labels"]).square().mean().item(), rel=1e-5)


def test_the_teacher_is_neither_trained_nor_saved_with_the_student_and_draws_no_dropout(encoder):
    teacher, student = encoder(dropout=0.5, seed=1).train(), encoder()
    trainee = Trainee(student, Distillation(teacher, DistillationSettings()))
    trainee.train()
    assert not teacher.training
    assert {id(p) for p in trainee.parameters()} == {id(p) for p in student.parameters()}
    trainee(batch([0, 1, 2]), 0)["distill"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.model.layers.parameters())


def test_masks_enter_the_student_and_learn_from_both_losses(encoder):
    masks = Masks(Prunable(3, 32, 4, 48), SparsitySettings(prepruning_ratio=0.1, warmup_ratio=0.2), target=0.6, steps=10, seed=1)
    student = encoder()
    objective = Distillation(encoder(seed=1), DistillationSettings(), masks)
    assert objective.targets(batch([0, 1]))["sparsity"] == 2
    masks.before_step(0)
    assert objective(student, batch([0, 1]), 0)["sparsity"].item() == 0
    masks.before_step(5)
    losses = objective(student, batch([0, 1]), 5)
    (losses["distill"]).backward()
    from_task = masks.units["neurons"].log_alpha.grad.clone()
    assert from_task.abs().sum() > 0
    assert masks.lagrangian.multipliers.grad is None
    losses["sparsity"].backward()
    assert (masks.units["neurons"].log_alpha.grad != from_task).any()
    assert masks.lagrangian.multipliers.grad is not None


def test_micro_batches_add_up_to_the_whole_batch(encoder):
    """Masks are drawn once a step, so that accumulated gradients are those of the batch taken at once."""
    whole = batch([0, 1, 2, 1])
    gradients = []
    for parts in ([whole], [{name: tensor[:3] for name, tensor in whole.items()}, {name: tensor[3:] for name, tensor in whole.items()}]):
        masks = Masks(Prunable(3, 32, 4, 48), SparsitySettings(prepruning_ratio=0), target=0.6, steps=10, seed=1)
        objective = Distillation(encoder(seed=1), DistillationSettings(), masks)
        masks.before_step(7)
        student = encoder()
        for part in parts:
            losses, targets = objective(student, part, 7), objective.targets(part)
            sum(losses[name] * targets[name] / 4 for name in losses).backward()
        gradients.append([p.grad.clone() for p in [*masks.parameters(), student.classifier.weight]])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
