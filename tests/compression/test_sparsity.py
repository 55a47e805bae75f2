"""Against numbers computed by the original implementation, and the constraint in a small simulated pruning."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.compression import goals
from pipeline.compression.goals import Goal
from pipeline.compression.hard_concrete import LIMIT, HardConcrete
from pipeline.compression.masks import GATES, Masks, alive
from pipeline.compression.settings import SparsitySettings
from pipeline.compression.shapes import round_up
from pipeline.compression.sparsity import FINE, PENALTY, Lagrangian, Prunable, parts
from pipeline.errors import UserError

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


UNITS = ("attention", "feedforward", "heads", "hidden", "neurons")
LAYERS = ("attention", "feedforward", "heads", "neurons")
ORIGINAL = Prunable(layers=3, hidden=8, heads=2, ffn=32)


def original_masks():
    masks = {unit: HardConcrete(ORIGINAL.shapes[unit], scalar=unit in GATES) for unit in UNITS}
    for unit, mask in masks.items():
        mask.log_alpha.data.copy_(torch.from_numpy(MODULE[f"{unit}_loga"]))
    return masks


def test_expected_sizes_are_the_originals_with_dimensions_and_without():
    keep = {unit: mask.keep_probability() for unit, mask in original_masks().items()}
    assert ORIGINAL.sparsity(keep).item() == pytest.approx(MODULE["expected_sparsity"].item(), abs=1e-6) == pytest.approx(0.741436, abs=1e-6)
    del keep["hidden"]
    assert ORIGINAL.sparsity(keep).item() == pytest.approx(1 - MODULE["expected_size_nohidden"] / ORIGINAL.total, abs=1e-6)


def test_the_lagrangian_and_its_slopes_are_the_originals_along_the_warm_up():
    """For every log alpha of all five units and both multipliers; target and penalty too."""
    constraint = Lagrangian(0.6, warmup=100)
    constraint.multipliers.data.copy_(torch.from_numpy(MODULE["lambda"]))
    for index, step in enumerate(MODULE["steps"].tolist()):
        masks = original_masks()
        penalty = constraint(ORIGINAL.sparsity({unit: mask.keep_probability() for unit, mask in masks.items()}), step)
        slopes = torch.autograd.grad(penalty, [constraint.multipliers, *(mask.log_alpha for mask in masks.values())])
        assert constraint.target_at(step) == pytest.approx(MODULE["target"][index])
        assert penalty.item() == pytest.approx(MODULE["penalty"][index], abs=1e-5)
        for unit, slope in zip(("multipliers", *masks), slopes, strict=True):
            np.testing.assert_allclose(slope, MODULE[f"{unit}_slope"][index], atol=1e-5)


def test_the_realised_size_is_the_originals():
    masks = {unit: mask.deterministic() for unit, mask in original_masks().items()}
    kept = {unit: (mask > 0).sum(-1).tolist() for unit, mask in masks.items()}
    assert (kept["hidden"], kept["heads"], kept["neurons"]) == tuple(MODULE[f"{unit}_kept"].tolist() for unit in ("hidden", "heads", "neurons"))
    assert all((masks[unit] > 0).tolist() == (MODULE[f"{unit}_kept"] > 0).tolist() for unit in GATES)
    layers = alive(masks, ORIGINAL)
    heads = ((masks["heads"] > 0) & layers["attention"][:, None]).sum()
    neurons = ((masks["neurons"] > 0) & layers["feedforward"][:, None]).sum()
    size = (4 * 4 * heads + 2 * neurons) * kept["hidden"]  # 4 d_h a head and dimension, 2 a neuron and dimension, as its trainer counts
    assert 1 - size.item() / ORIGINAL.total == pytest.approx(MODULE["realised_sparsity"].item(), abs=1e-6) == pytest.approx(0.717460, abs=1e-6)


def test_a_layer_is_alive_where_its_own_mask_and_a_unit_in_it_are():
    heads, gate = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 1.0]]), torch.tensor([1.0, 0.7, 0.0])
    neurons = torch.cat([torch.zeros(1, 32), torch.ones(2, 32)])
    found = alive({"heads": heads, "attention": gate, "neurons": neurons}, ORIGINAL)
    assert found["attention"].tolist() == [False, True, False]
    assert found["feedforward"].tolist() == [False, True, True]
    assert alive({"attention": gate}, ORIGINAL)["attention"].tolist() == [True, True, False]


def test_a_unit_without_masks_counts_as_kept():
    prunable = Prunable(layers=2, hidden=8, heads=2, ffn=32)
    assert prunable.sparsity({}).item() == 0
    assert prunable.sparsity({"heads": torch.zeros(2, 2)}).item() == pytest.approx(4 * prunable.head / prunable.total)


MINILM = Prunable(layers=6, hidden=384, heads=12, ffn=1536)


@pytest.mark.parametrize("target", [0.1, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("head_share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_parts_keep_together_what_the_target_keeps_and_none_more_than_it_has(target, head_share):
    held = parts(MINILM, MINILM.sparsity, target, LAYERS, head_share)
    kept, whole = ({unit: 1 - getattr(part, share) for unit, part in held.items()} for share in ("target", "dense"))
    assert sum(whole.values()) == pytest.approx(1, abs=1e-3)  # the official neuron is rounded down
    assert whole["heads"] == pytest.approx(72 * MINILM.head / MINILM.total)
    assert sum(kept.values()) == pytest.approx(1 - target)
    assert all(kept[unit] <= whole[unit] + 1e-6 for unit in kept)
    if all(share * (1 - target) <= whole[unit] for unit, share in {"heads": head_share, "neurons": 1 - head_share}.items()):
        assert kept["heads"] == pytest.approx(head_share * (1 - target), abs=1e-6)
    drawn = {unit: torch.rand(MINILM.shapes[unit]) for unit in LAYERS}
    assert sum(1 - part.removed(drawn).item() for part in held.values()) == pytest.approx(1 - MINILM.sparsity(drawn).item(), abs=1e-6)


@pytest.mark.parametrize(("units", "head_share"), [(LAYERS, None), (("heads",), 0.5), (("neurons", "attention", "hidden"), 0.5)])
def test_all_is_one_part_without_a_share_and_without_masks_on_heads_and_neurons(units, head_share):
    (part,) = parts(MINILM, MINILM.sparsity, 0.6, units, head_share).values()
    assert (part.removed, part.dense, part.target) == (MINILM.sparsity, 0, 0.6)


def test_a_shape_says_what_attention_keeps():
    (goal,) = goals.goals(SparsitySettings(units=LAYERS, shape={"layers": 2, "heads": 3, "ffn": 152}), MINILM)
    attention, feedforward = 2 * 3 * MINILM.head, 2 * 152 * MINILM.neuron
    assert goal.head_share == pytest.approx(attention / (attention + feedforward), abs=1e-3)
    assert parts(MINILM, goal.removed, goal.share, LAYERS, goal.head_share)["heads"].target == pytest.approx(1 - attention / MINILM.total, abs=1e-4)


def test_a_second_target_rises_from_the_first():
    constraint = Lagrangian(0.8, warmup=10, start=0.6)
    assert [constraint.target_at(step) for step in (-1, 0, 5, 10, 50)] == pytest.approx([0.6, 0.6, 0.7, 0.8, 0.8])
    assert Lagrangian(0.8, warmup=0, start=0.6).target_at(0) == 0.8


def simulate(target, steps, units=("heads", "neurons"), pull=1.0, head_share=None, **settings):
    """A pruning of a network whose loss is quadratic in what its masks take away; some units matter a hundred times more.

    pull: of what a kind of unit matters for, in all; or by kind.
    """
    prunable = Prunable(layers=4, hidden=64, heads=4, ffn=256)
    masks = Masks(prunable, SparsitySettings(units=units, **settings), target=target, steps=steps, seed=3, head_share=head_share)
    optimizer = masks.optimizer()
    generator = torch.Generator().manual_seed(0)
    fine = {unit: prunable.shapes[unit] for unit in ("heads", "neurons", "hidden")}
    pulls = pull if isinstance(pull, dict) else dict.fromkeys(fine, pull)
    weight = {unit: pulls.get(unit, 0.0) / math.prod(shape) * 10 ** (2 * torch.rand(shape, generator=generator) - 1) for unit, shape in fine.items()}
    logged = []
    for step in range(steps):
        masks.before_step(step)
        sample = masks.sample()
        loss = masks.penalty()
        if sample is not None:
            taken = {unit: sample.get(unit, torch.ones(shape)) for unit, shape in fine.items()}
            for layer, unit in FINE.items():
                taken[unit] = taken[unit] * sample[layer][:, None] if layer in sample else taken[unit]
            (loss + sum((weight[unit] * (1 - mask) ** 2).sum() for unit, mask in taken.items())).backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append(masks.after_step(step))
    return masks, weight, logged


@pytest.mark.parametrize("units", [("heads", "neurons"), LAYERS, UNITS], ids=len)
@pytest.mark.parametrize("target", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("pull", [0.1, 1.0])
@pytest.mark.parametrize("head_share", [None, 0.5])
def test_the_constraint_takes_the_masks_to_the_target_in_300_steps(target, pull, units, head_share):
    _, _, logged = simulate(target, 300, units, pull=pull, head_share=head_share)
    assert logged[-1]["target_sparsity"] == target
    assert logged[-1]["expected_sparsity"] == pytest.approx(target, abs=0.06)
    assert max(values["expected_sparsity"] for values in logged) < target + 0.1  # it does not overshoot on the way


@pytest.mark.parametrize("units", [("heads", "neurons"), LAYERS, UNITS], ids=len)
@pytest.mark.parametrize("pull", [0.1, 1.0])
@pytest.mark.parametrize("head_share", [None, 0.5])
def test_at_95_percent_the_target_is_held_and_layers_of_both_kinds_are_left(pull, units, head_share):
    """The official expected sparsity of masks at their limits is .953 without gates, so that there it asks for every single mask's end."""
    masks, _, logged = simulate(0.95, 600, units, pull=pull, head_share=head_share)
    hold = [values["expected_sparsity"] for values in logged[-60:]]
    assert max(hold) - min(hold) < 0.03
    assert hold[-1] == pytest.approx(0.95, abs=0.04)
    settled, _ = masks.settle()
    assert masks.realised_sparsity(settled).item() == pytest.approx(0.95, abs=0.003)
    assert all(living.any() for living in alive(settled, masks.prunable).values())


@pytest.mark.parametrize("units", [("heads", "neurons"), ("neurons",), LAYERS, UNITS, ("hidden",), ("heads", "hidden")], ids=str)
def test_settling_lands_on_the_target(units):
    masks, _, _ = simulate(0.5, 120, units=units)
    settled, shifts = masks.settle()
    assert masks.realised_sparsity(settled).item() == pytest.approx(0.5, abs=0.01 if units == ("hidden",) else 0.003)  # 64 dimensions alone
    assert set(shifts) == set(units)
    unsettled = masks.deterministic()
    for unit in units:  # kept values stay as trained
        both = (settled[unit] > 0) & (unsettled[unit] > 0)
        assert torch.equal(settled[unit][both], unsettled[unit][both])


def test_heads_that_none_misses_go_altogether_unless_attention_has_a_share_of_its_own():
    """In the simulated network neurons matter and heads do not, as each of many heads alike seems not to while others are there."""
    left = {}
    for head_share in (None, 0.5):
        masks, _, logged = simulate(0.9, 400, ("heads", "neurons"), head_share=head_share, pull={"heads": 0.001, "neurons": 1.0})
        settled, _ = masks.settle()
        assert masks.realised_sparsity(settled).item() == pytest.approx(0.9, abs=0.003)
        left[head_share] = int((settled["heads"] > 0).sum())
        assert {name for name in logged[-1] if "lambda_1" in name} == ({"lambda_1"} if head_share is None else {"lambda_1_heads", "lambda_1_neurons"})
    assert left[None] == 0
    assert left[0.5] == round(0.5 * 0.1 * masks.prunable.total / masks.prunable.head)


def test_settling_masks_that_missed_the_target_takes_of_every_unit():
    masks = Masks(Prunable(layers=4, hidden=64, heads=4, ffn=256), SparsitySettings(), target=0.5, steps=10, seed=1)
    settled, shifts = masks.settle()
    assert masks.realised_sparsity(settled).item() == pytest.approx(0.5, abs=0.003)
    assert max(shifts.values()) < -1
    assert all(0.1 < (mask == 0).float().mean() < 0.8 for mask in settled.values())


def test_settling_counts_what_rounding_to_multiples_gives_back():
    masks, _, _ = simulate(0.8, 200)
    head_dim = masks.prunable.hidden // masks.prunable.heads
    after = round_up(masks.settle()[0], masks.scores, 32, head_dim)
    within, _ = goals.settle(masks, Goal("0.8", 0.8, masks.prunable.sparsity), 32)
    assert all(count % 32 == 0 for count in (within["neurons"] > 0).sum(-1).tolist())
    missed = [abs(masks.realised_sparsity(found).item() - 0.8) for found in (after, within)]
    assert missed[1] < 0.01 < missed[0]


def test_heads_alone_land_within_half_a_head():
    masks, _, _ = simulate(0.2, 120, units=("heads",))
    assert masks.realised_sparsity(masks.settle()[0]).item() == pytest.approx(0.2, abs=0.51 * masks.prunable.head / masks.prunable.total)


@pytest.mark.parametrize(("ratio", "lost"), [(0.2, False), (1.0, True)])
def test_layers_fall_first_where_their_masks_travel_as_fast_as_those_within_them(ratio, lost):
    masks, _, _ = simulate(0.95, 400, LAYERS, pull=0.1, gate_lr_ratio=ratio)
    left = sum(living.sum().item() for living in alive(masks.settle()[0], masks.prunable).values())
    assert (left < 4) == lost


def test_masks_of_a_second_target_start_where_those_of_the_first_ended():
    first, _, _ = simulate(0.5, 120)
    second = Masks(first.prunable, SparsitySettings(prepruning_ratio=0.5, warmup_ratio=0.2), target=0.8, steps=10, seed=2, before=first)
    second.before_step(0)
    assert second.sample() is not None  # no step leaves the student whole
    assert second.expected_sparsity().item() == first.expected_sparsity().item()
    assert second.after_step(0)["target_sparsity"] == 0.5
    assert second.lagrangians["all"].multipliers.tolist() == [0, PENALTY]


def test_what_matters_more_is_kept():
    masks, weight, _ = simulate(0.6, 300)
    settled, _ = masks.settle()
    for unit, mask in settled.items():
        assert weight[unit][mask > 0].mean() > 2 * weight[unit][mask == 0].mean()


def test_nothing_moves_before_pruning_begins():
    masks = Masks(Prunable(2, 16, 2, 32), SparsitySettings(prepruning_ratio=0.5, warmup_ratio=0.2), target=0.5, steps=10, seed=1)
    masks.before_step(4)
    assert masks.sample() is None
    assert masks.penalty().item() == 0
    assert not masks.penalty().requires_grad
    masks.before_step(5)
    assert masks.sample() is not None


def test_a_step_draws_the_same_for_every_micro_batch_and_rank_and_other_steps_differ():
    shape, settings = Prunable(2, 16, 2, 32), SparsitySettings(prepruning_ratio=0)
    one, other = (Masks(shape, settings, target=0.5, steps=10, seed=1) for _ in range(2))
    one.before_step(3)
    other.before_step(3)
    first, again, elsewhere = one.sample(), one.sample(), other.sample()
    for unit in first:
        assert torch.equal(first[unit], again[unit])
        assert torch.equal(first[unit], elsewhere[unit])
    other.before_step(4)
    assert not torch.equal(first["neurons"], other.sample()["neurons"])


def test_the_multipliers_climb_and_the_masks_descend():
    masks = Masks(Prunable(2, 16, 2, 32), SparsitySettings(prepruning_ratio=0, warmup_ratio=0), target=0.5, steps=10, seed=1)
    optimizer, before = masks.optimizer(), masks.expected_sparsity().item()
    start = masks.lagrangians["all"].multipliers.detach().clone()
    masks.before_step(0)
    masks.penalty().backward()
    optimizer.step()
    assert masks.lagrangians["all"].multipliers[0] < start[0]  # below the target: its price falls below 0
    assert masks.lagrangians["all"].multipliers[1] > start[1]
    assert masks.expected_sparsity().item() > before


def test_all_closed_units_of_a_layer_are_worth_less_than_an_open_one():
    """By the keep probability, .047 where log alpha is at its least, 22 closed neurons would be worth an open one."""
    masks = Masks(Prunable(layers=2, hidden=64, heads=4, ffn=4096), SparsitySettings(units=LAYERS), target=0.9, steps=10, seed=1)
    for unit, mask in masks.units.items():
        mask.log_alpha.data.fill_(LIMIT if unit in GATES else -LIMIT)
    for unit in ("heads", "neurons"):
        masks.units[unit].log_alpha.data[0, 1] = LIMIT
    for worth in masks.worth().values():
        assert worth[0].argmax() == 1
        assert 0 < worth[1].sum() < worth[0, 1]


@pytest.mark.parametrize("units", [UNITS, LAYERS, ("heads", "neurons"), ("attention", "feedforward"), ("hidden",)], ids=str)
def test_something_is_left_of_closed_masks(units):
    prunable = Prunable(layers=2, hidden=32, heads=4, ffn=64)
    most = 0.99 if "neurons" in units else 0.6
    masks = Masks(prunable, SparsitySettings(units=units), target=most, steps=10, seed=1)
    for mask in masks.units.values():
        mask.log_alpha.data.fill_(-LIMIT)
    settled, _ = masks.settle()
    assert prunable.sparsity({unit: (mask > 0).float() for unit, mask in settled.items()}) < 1


TINY = Prunable(layers=2, hidden=32, heads=4, ffn=64)


@pytest.mark.parametrize(
    ("settings", "options", "most"),
    [
        ({"target": 0.9999}, {}, 1 - 66 / 16_960),
        ({"target": 0.9999, "units": LAYERS}, {}, 1 - 66 / 16_960),
        ({"target": 0.99}, {"multiple": 8}, 1 - 8 * 66 / 16_960),
        ({"target": 0.99}, {"together": True}, 1 - (1056 + 66) / 16_960),
        ({"target": 0.99, "units": ("attention", "feedforward")}, {}, 1 - 4 * 1056 / 16_960),
        ({"target": 0.999, "units": ("attention", "neurons")}, {}, 1 - 66 / 16_960),
        ({"target": 0.5, "units": ("heads",)}, {}, 8 * 1056 / 16_960),
        ({"shape": {"layers": 1, "heads": 4, "ffn": 64}, "units": ("attention",)}, {}, 8 * 1056 / 16_960),
    ],
)
def test_what_leaves_nothing_or_what_units_cannot_make_is_refused(settings, options, most):
    with pytest.raises(UserError, match=f"make at most {most:.4g}; lower"):
        goals.goals(SparsitySettings(**settings), TINY, **options)


def test_the_most_that_leaves_something_is_taken():
    one = 1 - TINY.neuron / TINY.total
    assert goals.goals(SparsitySettings(target=one), TINY)[0].share == one
    both = 1 - (TINY.neuron + TINY.head) / TINY.total
    assert goals.goals(SparsitySettings(target=both), TINY, together=True)[0].share == both
    (smallest,) = goals.goals(SparsitySettings(shape={"layers": 1, "heads": 1, "ffn": 1}, units=LAYERS), TINY)
    assert smallest.share == pytest.approx(both, abs=1e-6)


def test_of_a_shape_layers_and_dimensions_keep_the_values_of_their_masks():
    masks = Masks(TINY, SparsitySettings(units=UNITS), target=0.5, steps=10, seed=1)
    with torch.no_grad():
        for mask in masks.units.values():
            mask.log_alpha.copy_(torch.linspace(-1, 2, mask.log_alpha.numel()).view(mask.log_alpha.shape))
    for hidden, dimensions in ((None, 32), (16, 16)):
        (goal,) = goals.goals(SparsitySettings(units=UNITS, shape={"layers": 1, "heads": 2, "ffn": 24, "hidden": hidden}), TINY)
        settled, _ = goals.settle(masks, goal, 1)
        assert {unit: int((mask > 0).sum()) for unit, mask in settled.items()} == {
            "attention": 1, "feedforward": 1, "hidden": dimensions, "heads": 2, "neurons": 24
        }  # fmt: skip
        for unit, mask in settled.items():
            assert torch.equal(mask[mask > 0], masks.soft()[unit][mask > 0])
