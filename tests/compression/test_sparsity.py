"""Against numbers computed by the original implementation, and the constraint in a small simulated pruning."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.compression.hard_concrete import HardConcrete
from pipeline.compression.masks import Masks
from pipeline.compression.settings import SparsitySettings
from pipeline.compression.sparsity import Lagrangian, Prunable

MODULE = np.load(Path(__file__).parent / "mask_module.npz")


@pytest.mark.parametrize(
    ("shape", "head", "neuron", "total"),
    [
        (Prunable(layers=3, hidden=8, heads=2, ffn=16), 144, 18, 1752),
        (Prunable(layers=3, hidden=8, heads=2, ffn=32), 144, 17, 2520),
        (Prunable(layers=12, hidden=768, heads=12, ffn=3072), 196_864, 1537, 85_017_600),
        (Prunable(layers=24, hidden=1024, heads=16, ffn=4096), 262_400, 2049, 302_211_072),
    ],
)
def test_sizes_are_the_published_ones(shape, head, neuron, total):
    assert (shape.head, shape.neuron, shape.total) == (head, neuron, total)


def test_expected_size_is_the_originals():
    def keep(unit):
        masks = HardConcrete(MODULE[f"{unit}_loga"].shape)
        masks.log_alpha.data.copy_(torch.from_numpy(MODULE[f"{unit}_loga"]))
        return masks.keep_probability()

    prunable = Prunable(layers=3, hidden=8, heads=2, ffn=32)
    sparsity = prunable.sparsity({"heads": keep("heads") * keep("attention")[:, None], "neurons": keep("neurons") * keep("feedforward")[:, None]})
    assert sparsity.item() == pytest.approx(1 - MODULE["expected_size_nohidden"] / MODULE["prunable_model_size"], abs=1e-6)


def test_a_unit_without_masks_counts_as_kept():
    prunable = Prunable(layers=2, hidden=8, heads=2, ffn=32)
    assert prunable.sparsity({}).item() == 0
    assert prunable.sparsity({"heads": torch.zeros(2, 2)}).item() == pytest.approx(4 * prunable.head / prunable.total)


def test_the_lagrangian_and_its_slopes_are_the_originals_along_the_warm_up():
    constraint = Lagrangian(0.6, warmup=100)
    constraint.multipliers.data.copy_(torch.from_numpy(MODULE["lambda"]))
    for index, step in enumerate(MODULE["steps"].tolist()):
        assert constraint.target_at(step) == pytest.approx(MODULE["target"][index])
        penalty = constraint(torch.tensor(MODULE["expected_sparsity"].item()), step)
        (slope,) = torch.autograd.grad(penalty, constraint.multipliers)
        assert penalty.item() == pytest.approx(MODULE["penalty"][index], abs=1e-5)
        np.testing.assert_allclose(slope, MODULE["multipliers_slope"][index], atol=1e-5)


def simulate(target, steps, units=("heads", "neurons"), pull=1.0):
    """A pruning of a network whose loss is quadratic in what its masks take away; some units matter a hundred times more."""
    settings = SparsitySettings(target=target, units=units)
    prunable = Prunable(layers=4, hidden=64, heads=4, ffn=256)
    masks = Masks(prunable, settings, steps=steps, seed=3)
    optimizer = masks.optimizer()
    generator = torch.Generator().manual_seed(0)
    shapes = {unit: mask.log_alpha.shape for unit, mask in masks.units.items()}
    weight = {unit: pull / shape.numel() * 10 ** (2 * torch.rand(shape, generator=generator) - 1) for unit, shape in shapes.items()}
    logged = []
    for step in range(steps):
        masks.before_step(step)
        sample = masks.sample()
        loss = masks.penalty()
        if sample is not None:
            (loss + sum((weight[unit] * (1 - mask) ** 2).sum() for unit, mask in sample.items())).backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append(masks.after_step(step))
    return masks, weight, logged


@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("pull", [0.1, 1.0])
def test_the_constraint_takes_the_masks_to_the_target_in_300_steps(target, pull):
    _, _, logged = simulate(target, 300, pull=pull)
    assert logged[-1]["target_sparsity"] == target
    assert logged[-1]["expected_sparsity"] == pytest.approx(target, abs=0.06)
    assert max(values["expected_sparsity"] for values in logged) < target + 0.1  # it does not overshoot on the way


@pytest.mark.parametrize("units", [("heads", "neurons"), ("neurons",)])
def test_settling_lands_on_the_target(units):
    masks, _, _ = simulate(0.5, 120, units=units)
    settled, shifts = masks.settle()
    assert masks.realised_sparsity(settled).item() == pytest.approx(0.5, abs=0.003)
    assert set(shifts) == set(units)
    unsettled = masks.deterministic()
    for unit in units:  # kept values stay as trained
        both = (settled[unit] > 0) & (unsettled[unit] > 0)
        assert torch.equal(settled[unit][both], unsettled[unit][both])


def test_settling_masks_that_missed_the_target_takes_of_every_unit():
    masks = Masks(Prunable(layers=4, hidden=64, heads=4, ffn=256), SparsitySettings(target=0.5), steps=10, seed=1)
    settled, shifts = masks.settle()
    assert masks.realised_sparsity(settled).item() == pytest.approx(0.5, abs=0.003)
    assert max(shifts.values()) < -1
    assert all(0.1 < (mask == 0).float().mean() < 0.8 for mask in settled.values())


def test_heads_alone_land_within_half_a_head():
    masks, _, _ = simulate(0.2, 120, units=("heads",))
    assert masks.realised_sparsity(masks.settle()[0]).item() == pytest.approx(0.2, abs=0.51 * masks.prunable.head / masks.prunable.total)


def test_what_matters_more_is_kept():
    masks, weight, _ = simulate(0.6, 300)
    settled, _ = masks.settle()
    for unit, mask in settled.items():
        assert weight[unit][mask > 0].mean() > 2 * weight[unit][mask == 0].mean()


def test_nothing_moves_before_pruning_begins():
    masks = Masks(Prunable(2, 16, 2, 32), SparsitySettings(prepruning_ratio=0.5, warmup_ratio=0.2), steps=10, seed=1)
    masks.before_step(4)
    assert masks.sample() is None
    assert masks.penalty().item() == 0
    assert not masks.penalty().requires_grad
    masks.before_step(5)
    assert masks.sample() is not None


def test_a_step_draws_the_same_for_every_micro_batch_and_rank_and_other_steps_differ():
    shape, settings = Prunable(2, 16, 2, 32), SparsitySettings(prepruning_ratio=0)
    one, other = (Masks(shape, settings, steps=10, seed=1) for _ in range(2))
    one.before_step(3)
    other.before_step(3)
    first, again, elsewhere = one.sample(), one.sample(), other.sample()
    for unit in first:
        assert torch.equal(first[unit], again[unit])
        assert torch.equal(first[unit], elsewhere[unit])
    other.before_step(4)
    assert not torch.equal(first["neurons"], other.sample()["neurons"])


def test_the_multipliers_climb_and_the_masks_descend():
    masks = Masks(Prunable(2, 16, 2, 32), SparsitySettings(prepruning_ratio=0, warmup_ratio=0), steps=10, seed=1)
    optimizer, before = masks.optimizer(), masks.expected_sparsity().item()
    start = masks.lagrangian.multipliers.detach().clone()
    masks.before_step(0)
    masks.penalty().backward()
    optimizer.step()
    assert masks.lagrangian.multipliers[0] < start[0]  # below the target: its price falls below 0
    assert masks.lagrangian.multipliers[1] > start[1]
    assert masks.expected_sparsity().item() > before
