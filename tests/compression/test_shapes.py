import pytest
import torch

from pipeline.compression.shapes import Shape, round_up, to_shape
from pipeline.compression.sparsity import Prunable
from pipeline.compression.surgery import remove
from pipeline.errors import UserError

MODEL = Prunable(layers=3, hidden=32, heads=4, ffn=48)


def scores(seed=0, units=("attention", "feedforward", "heads", "neurons", "hidden")):
    generator = torch.Generator().manual_seed(seed)
    return {unit: torch.randn(MODEL.shapes[unit], generator=generator) for unit in units}


def test_the_removed_model_has_the_shape_and_keeps_the_best(encoder):
    given = scores()
    given["attention"], given["feedforward"] = torch.tensor([0.1, 3.0, 2.0]), torch.tensor([-1.0, 0.5, 5.0])
    masks = to_shape(given, Shape(layers=2, heads=3, ffn=20, hidden=24), MODEL)
    for unit in ("heads", "neurons"):
        assert not masks[unit][0].any()
        for row in (1, 2):
            assert given[unit][row][masks[unit][row] == 1].min() > given[unit][row][masks[unit][row] == 0].max()
    config = remove(encoder(), masks).config
    assert (config.heads_per_layer, config.ffn_per_layer, config.hidden_size) == ([0, 3, 3], [0, 20, 20], 24)


def test_layers_stay_by_the_ranks_of_both_sub_layers():
    """Sums of ranks 0 + 2, 2 + 1, 1 + 0: a score of 100 is no more than the best."""
    given = {"attention": torch.tensor([-1.0, 1.0, 0.0]), "feedforward": torch.tensor([100.0, 0.1, 0.0])}
    layers = [to_shape(given, Shape(count, 4, 48, 32), MODEL)["heads"].any(1).tolist() for count in (1, 2, 3)]
    assert layers == [[False, True, False], [True, True, False], [True, True, True]]


def test_what_stays_whole_needs_no_scores():
    masks = to_shape(scores(units=("neurons",)), Shape(layers=3, heads=4, ffn=8, hidden=32), MODEL)
    assert masks.keys() == {"heads", "neurons"}
    assert masks["heads"].all()
    assert masks["neurons"].sum(1).tolist() == [8, 8, 8]


@pytest.mark.parametrize(
    ("shape", "units", "message"),
    [
        (Shape(4, 4, 48, 32), ("heads",), "layers is 4, the model has 3"),
        (Shape(3, 0, 100, 32), ("heads",), "heads is 0, the model has 4; ffn is 100, the model has 48"),
        (Shape(2, 4, 24, 32), ("neurons",), "add attention or feedforward to the units"),
        (Shape(3, 2, 24, 16), ("neurons",), "add heads, hidden to the units"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape, units, message):
    with pytest.raises(UserError, match=message):
        to_shape(scores(units=units), shape, MODEL)


@pytest.mark.parametrize(("heads", "hidden", "stock"), [(4, 32, True), (3, 24, True), (3, 32, False), (4, 24, False)])
def test_stock_classes_hold_shapes_whose_heads_are_as_wide_as_the_residual_stream(heads, hidden, stock):
    assert Shape(2, heads, 20, hidden).is_stock(MODEL) == stock


def masks_of(counts, width, value=1.0):
    return torch.stack([torch.cat([torch.full((count,), value), torch.zeros(width - count)]) for count in counts])


def test_neurons_are_kept_to_the_next_multiple_by_score():
    given = {"neurons": torch.arange(20.0).expand(4, 20)}  # the dropped of highest score are the last
    masks = {"neurons": masks_of([0, 3, 8, 18], 20)}
    rounded = round_up(masks, given, 8, head_dim=64)["neurons"]
    assert rounded.sum(1).tolist() == [0, 8, 8, 20]
    assert rounded[1].nonzero().flatten().tolist() == [0, 1, 2, 15, 16, 17, 18, 19]
    assert torch.equal(rounded[2], masks["neurons"][2])


@pytest.mark.parametrize(("multiple", "head_dim", "expected"), [(64, 64, [1, 3, 4]), (64, 32, [2, 4, 4]), (64, 16, [4, 4, 4]), (8, 8, [1, 3, 4])])
def test_heads_are_kept_until_their_widths_together_are_a_multiple(multiple, head_dim, expected):
    masks = {"heads": masks_of([1, 3, 4], 4)}
    assert round_up(masks, {"heads": torch.zeros(3, 4)}, multiple, head_dim)["heads"].sum(1).tolist() == expected


def test_what_comes_back_has_the_smallest_value_kept_in_its_layer():
    masks = {
        "neurons": torch.tensor([[0.9, 0.4, 0, 0], [0.7, 0.8, 0.9, 0]]),
        "hidden": torch.tensor([0.5, 0, 0, 0]),
        "attention": torch.tensor([0.0]),
    }
    rounded = round_up(masks, {"neurons": torch.zeros(2, 4), "hidden": torch.tensor([0, 1.0, 2, 3])}, 2, head_dim=8)
    assert torch.equal(rounded["neurons"], torch.tensor([[0.9, 0.4, 0, 0], [0.7, 0.8, 0.9, 0.7]]))
    assert torch.equal(rounded["hidden"], torch.tensor([0.5, 0, 0, 0.5]))
    assert rounded["attention"] is masks["attention"]
