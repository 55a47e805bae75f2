"""What a table's time is spent on, beside every way there is to spend it."""

import itertools

import pytest
import torch

from pipeline.compression.knapsack import BINS, deal
from pipeline.compression.latency import Table
from pipeline.compression.sparsity import realised

TABLE = Table(
    layers=3,
    widths=(8, 16),
    heads=(0, 1, 2, 3),
    neurons=(0, 1, 2, 6),
    attention=((0.0, 2.0, 2.5, 3.0), (0.0, 4.0, 4.5, 6.0)),
    feedforward=((0.0, 3.0, 3.0, 5.0), (0.0, 5.0, 5.0, 9.0)),
    rows=1,
    length=8,
    device="paper",
    threads=1,
)
UNITS = {"heads": 3, "neurons": 6}


def thin(seed=0, gates=False):
    """Soft masks that leave a head and a neuron in every layer, and what all units are worth."""
    generator = torch.Generator().manual_seed(seed)
    worth = {unit: torch.rand(3, number, generator=generator) for unit, number in UNITS.items()}
    masks = {unit: torch.where(values == values.amax(1, keepdim=True), 0.5 + values / 2, 0.0) for unit, values in worth.items()}
    return masks | ({"attention": torch.full((3,), 0.9), "feedforward": torch.full((3,), 0.8)} if gates else {}), worth


def gain(worth, counts):
    return sum(row.sort(descending=True).values[:count].sum().item() for row, count in zip(worth, counts, strict=True))


@pytest.mark.parametrize("width", [None, 16, 12])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_no_other_numbers_are_worth_more_in_the_time(share, seed, width):
    masks, worth = thin(seed)
    masks |= {} if width is None else {"hidden": (torch.arange(16) < width).float()}
    found = deal(TABLE, masks, worth, share, {})
    assert realised(TABLE.saved, found).item() >= 1 - share - 1e-6
    kept = {unit: (mask > 0).float() for unit, mask in masks.items()}
    times = {layer: TABLE.time_of(layer, kept).item() for layer in ("attention", "feedforward")}
    for layer, unit in (("attention", "heads"), ("feedforward", "neurons")):
        budget = times[layer] / sum(times.values()) * share * TABLE.dense
        costs = TABLE.times(layer, torch.arange(UNITS[unit] + 1), kept).tolist()
        fits = (counts for counts in itertools.product(range(UNITS[unit] + 1), repeat=3) if sum(costs[n] for n in counts) <= budget * (1 - 3 / BINS))
        counts = (found[unit] > 0).sum(1).tolist()
        assert sum(costs[n] for n in counts) <= budget + 1e-6
        assert gain(worth[unit], counts) >= max(gain(worth[unit], other) for other in fits) - 1e-6
        for mask, row, count in zip(found[unit], worth[unit], counts, strict=True):
            assert set(mask.nonzero().flatten().tolist()) == set(row.argsort(descending=True)[:count].tolist())


def test_few_full_layers_take_the_place_of_many_thin_ones():
    masks, worth = thin(gates=True)
    found = deal(TABLE, masks, worth, 1 - realised(TABLE.saved, masks).item(), {})
    left = {unit: (found[unit] > 0).sum(1).tolist() for unit in UNITS}
    assert left == {"heads": [3, 0, 3], "neurons": [0, 3, 6]}  # of one in each layer
    for layer, unit in (("attention", "heads"), ("feedforward", "neurons")):
        living = torch.tensor(left[unit]) > 0
        assert torch.equal(found[layer], masks[layer] * living)
        kept = masks[unit] > 0
        assert torch.equal(found[unit][living][kept[living]], masks[unit][living][kept[living]])
        assert (found[unit][(found[unit] > 0) & ~kept] == masks[unit][kept].min()).all()


def test_numbers_are_multiples_or_all():
    masks, worth = thin()
    for share in (0.4, 0.6, 0.9):
        found = deal(TABLE, masks, worth, share, {"heads": 2, "neurons": 4})
        assert set((found["neurons"] > 0).sum(1).tolist()) <= {0, 4, 6}
        assert set((found["heads"] > 0).sum(1).tolist()) <= {0, 2, 3}
        assert all(mask.any() for mask in found.values())


def test_units_without_masks_stay_and_cost_what_they_cost():
    masks, worth = thin()
    found = deal(TABLE, {"neurons": masks["neurons"]}, worth, 0.75, {})
    assert found.keys() == {"neurons"}
    assert 0.75 * TABLE.dense - 5 <= TABLE.time({"neurons": (found["neurons"] > 0).float()}).item() <= 0.75 * TABLE.dense
    nothing = {unit: torch.zeros_like(mask) for unit, mask in masks.items()}
    assert all(torch.equal(mask, nothing[unit]) for unit, mask in deal(TABLE, nothing, worth, 0.5, {}).items())


def test_time_that_holds_no_unit_leaves_what_the_masks_left():
    masks, worth = thin(gates=True)
    found = deal(TABLE, masks, worth, 0.12, {})  # as long as the cheapest head, of which neurons have more than half
    assert all(torch.equal(found[unit], mask) for unit, mask in masks.items())
