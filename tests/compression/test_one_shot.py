"""Importance beside a loop over rows and plain differences, and what is chosen by it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from pipeline.compression.one_shot import choose, importance
from pipeline.compression.sparsity import Prunable
from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineForMaskedLM
from pipeline.objectives.classify import Classify

UNITS = ("attention", "feedforward", "heads", "neurons", "hidden")
MINILM = Prunable(layers=6, hidden=384, heads=12, ffn=1536)


def rows(count=6, length=9):
    generator = torch.Generator().manual_seed(3)
    attention_mask = torch.ones(count, length, dtype=torch.long)
    attention_mask[1, 5:] = 0
    labels = torch.randint(3, (count,), generator=generator)
    return {"input_ids": torch.randint(1, 50, (count, length), generator=generator), "attention_mask": attention_mask, "labels": labels}


def cut(batch, *sizes):
    return [dict(zip(batch, parts, strict=True)) for parts in zip(*(tensor.split(sizes) for tensor in batch.values()), strict=True)]


def loss_of(model, masks, batch):
    return Classify().forward(partial(model, masks=masks), batch, 0)["classify"] * len(batch["labels"])


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("units", "weighed"), [(("heads", "neurons"), {"heads", "neurons"}), (UNITS[1:], {"heads"}), (UNITS, set())])
def test_importance_is_that_of_a_loop_over_rows(encoder, norm, units, weighed):
    model, shapes = encoder(norm), Prunable.of(encoder().config).shapes
    found = importance(model, [rows()], partial(loss_of, model), units=units)
    sums = {unit: torch.zeros(shapes[unit]) for unit in units}
    for row in cut(rows(), *[1] * 6):
        for unit in units:
            mask = torch.ones(shapes[unit], requires_grad=True)
            (gradient,) = torch.autograd.grad(loss_of(model, {unit: mask}, row), mask)
            sums[unit] += gradient.abs()
    for unit in units:
        length = sums[unit].norm(dim=-1, keepdim=True)  # a layer's; halfway where nothing else tells layers apart
        torch.testing.assert_close(found[unit].float(), sums[unit] / (length.sqrt() if unit in weighed else length), rtol=1e-3, atol=1e-5)
        assert found[unit].min() >= 0


def test_importance_does_not_depend_on_how_batches_cut_the_data(encoder):
    model = encoder()
    whole = importance(model, [rows()], partial(loss_of, model), units=UNITS)
    parts = importance(model, cut(rows(), 1, 3, 2), partial(loss_of, model), units=UNITS)
    for unit in UNITS:
        torch.testing.assert_close(parts[unit], whole[unit], rtol=1e-3, atol=1e-5)


def test_dropout_and_unpadded_batches_change_nothing_and_the_model_is_left_as_it_was(encoder):
    plain, model = encoder(), encoder(dropout=0.5)
    model.train()
    model.config.unpadded = True
    model.classifier.bias.requires_grad_(False)
    expected = importance(plain, [rows()], partial(loss_of, plain))
    found = importance(model, [rows()], partial(loss_of, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert model.training
    assert model.config.unpadded
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["classifier.bias"]
    assert all(p.grad is None for p in model.parameters())


def test_a_language_model_has_importance_too(encoder):
    model = encoder(kind=TrimlineForMaskedLM)
    batch = rows()
    batch["labels"] = torch.where(torch.arange(9) % 4 == 1, batch["input_ids"], -100) * batch["attention_mask"].clamp(max=1)

    def summed(masks, batch):
        return model(**batch, masks=masks).loss * (batch["labels"] != -100).sum()

    whole, parts = (importance(model, batches, summed, units=UNITS) for batches in ([batch], cut(batch, 1, 2, 3)))
    for unit in UNITS:
        torch.testing.assert_close(parts[unit], whole[unit], rtol=1e-3, atol=1e-5)


def test_the_important_head_and_the_idle_neuron_are_told(encoder):
    model = encoder()
    with torch.no_grad():
        attention, feed_forward = model.model.layers[1].attention, model.model.layers[1].feed_forward
        attention.output.weight[:, 8:16] *= 5
        feed_forward.down.weight[:, 7] = 0
    found = importance(model, [rows()], partial(loss_of, model))
    assert found["heads"][1].argmax() == 1
    assert found["neurons"][1, 7] == 0


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_importance_ranks_neurons_as_taking_each_away_does(encoder, layer):
    model, batch = encoder(), rows(32)
    found = importance(model, [batch], partial(loss_of, model))["neurons"][layer]

    def losses(masks):
        with torch.no_grad():
            return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"], masks=masks).logits, batch["labels"], reduction="none")

    without = torch.ones(48, 3, 48)
    without[torch.arange(48), layer, torch.arange(48)] = 0
    moved = [(losses({"neurons": masks}) - losses(None)).abs().mean() for masks in without]
    assert spearmanr(found, moved).statistic > 0.95


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {unit: torch.rand(shape, generator=generator, dtype=torch.float64) for unit, shape in MINILM.shapes.items()}


def fine(seed=0):
    return {unit: score / score.norm(dim=-1, keepdim=True) for unit, score in scores(seed).items() if unit in ("heads", "neurons")}


@pytest.mark.parametrize("target", [0.2, 0.6, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_what_is_chosen_removes_the_target_to_a_neuron_and_keeps_heads_and_neurons(target, share):
    masks = choose(fine(), MINILM.sparsity, target, head_share=share)
    step = MINILM.head / MINILM.total if share == 0.9 else MINILM.neuron / MINILM.total  # with all neurons kept what is left over are heads
    assert target - 1e-6 <= MINILM.sparsity(masks).item() < target + step
    assert min(mask.sum() for mask in masks.values()) >= 1


@pytest.mark.parametrize(("target", "heads"), [(0.95, 5), (0.8, 21), (0.1, 72)])
def test_heads_have_half_of_what_is_kept_until_they_are_all_there(target, heads):
    """Of MiniLM's 6 x 12 heads of 49,248 parameters each."""
    masks = choose(fine(), MINILM.sparsity, target)
    assert masks["heads"].sum() == heads
    assert heads == min(72, int(0.5 * (1 - target) * MINILM.total / MINILM.head))


def test_one_ranking_of_all_by_importance_per_parameter_would_delete_every_head():
    """The same importance for every unit of a layer: what normalised scores look like on the whole."""
    each = {"heads": torch.ones(6, 12), "neurons": torch.ones(6, 1536)}
    each = {unit: score / score.norm(dim=-1, keepdim=True) for unit, score in each.items()}
    dearest_head, cheapest_neuron = each["heads"].max() / MINILM.head, each["neurons"].min() / MINILM.neuron
    assert dearest_head < cheapest_neuron
    assert choose(each, MINILM.sparsity, 0.95)["heads"].sum() == 5


@pytest.mark.parametrize(("share", "gone"), [(0.0, "heads"), (1.0, "neurons")])
def test_all_heads_or_neurons_go_only_where_that_is_asked_for(share, gone):
    masks = choose(fine(), MINILM.sparsity, 0.9, head_share=share)
    assert [unit for unit, mask in masks.items() if not mask.any()] == [gone]


def test_the_best_of_all_layers_stay():
    given = fine()
    masks = choose(given, MINILM.sparsity, 0.9)
    for unit, mask in masks.items():
        assert given[unit][mask == 1].min() > given[unit][mask == 0].max()


def test_units_of_important_layers_are_preferred():
    given = {**fine(), "attention": torch.tensor([0.0, 0, 1, 0, 0, 0]), "feedforward": torch.tensor([0.0, 0, 0, 0, 0.6, 0.8])}
    masks = choose(given, MINILM.sparsity, 0.95)
    assert masks["heads"].sum(1).nonzero().flatten().tolist() == [2]
    assert masks["neurons"].sum(1).nonzero().flatten().tolist() == [4, 5]


def test_rounded_sizes_are_within_the_target():
    masks = choose(fine(), MINILM.sparsity, 0.9, multiple=64, head_dim=32)
    assert {count % 64 for count in masks["neurons"].sum(1).tolist()} == {0}
    assert {count % 2 for count in masks["heads"].sum(1).tolist()} == {0}
    assert 0.9 - 1e-6 <= MINILM.sparsity(masks).item() < 0.91


def test_any_measure_of_what_is_removed_serves():
    def saved(keep):  # a layer's first head is dear, as in time
        return 1 - ((keep["heads"].sum(1) > 0) * 3 + keep["heads"].sum(1) + keep["neurons"].sum(1) / 100).sum() / 200

    masks = choose(fine(), saved, 0.75)
    assert 0.75 - 1e-6 <= saved(masks).item() < 0.751


def test_a_target_without_room_for_a_head_and_a_neuron_is_refused():
    with pytest.raises(UserError, match=r"prune: to remove 0\.9999 .* lower the target"):
        choose(fine(), MINILM.sparsity, 0.9999)
