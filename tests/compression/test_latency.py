"""What a table makes of masks, on made-up times; of measured ones only what any machine gives."""

import numpy as np
import pytest
import torch

from pipeline.compression.latency import Table, _grid, _rising
from pipeline.compression.sparsity import Prunable
from pipeline.errors import UserError
from pipeline.models.positions import SCHEMES

TABLE = Table(
    layers=2,
    widths=(8, 16),
    heads=(0, 1, 2),
    neurons=(0, 1, 9, 17),
    attention=((0.0, 2.0, 3.0), (0.0, 3.0, 5.0)),
    feedforward=((0.0, 1.0, 2.0, 4.0), (0.0, 1.0, 3.0, 7.0)),
    rows=1,
    length=8,
    device="paper",
    threads=1,
)


def counts(heads, neurons):
    """Zeros and ones, so many of each layer."""
    return {
        "heads": torch.stack([(torch.arange(2) < count).float() for count in heads]),
        "neurons": torch.stack([(torch.arange(17) < count).float() for count in neurons]),
    }


@pytest.mark.parametrize(
    ("keep", "time"),
    [
        ({}, 24.0),
        (counts([2, 2], [17, 17]), 24.0),
        (counts([1, 2], [1, 9]), 3 + 5 + 1 + 3),
        (counts([0, 1], [0, 5]), 0 + 3 + 0 + 2),
        (counts([0, 0], [0, 0]), 0.0),
        ({"heads": torch.tensor([[0.5, 0.25], [0.75, 0.75]])}, 0.75 * 3 + 4 + 14),
        ({"attention": torch.tensor([0.5, 1.0]), "feedforward": torch.tensor([0.0, 0.25])}, 2.5 + 5 + 0 + 1.75),
        ({**counts([1, 2], [1, 9]), "attention": torch.tensor([0.0, 0.5])}, 2.5 + 1 + 3),
        ({"hidden": torch.ones(16)}, 24.0),
        ({"hidden": torch.full((16,), 0.75)}, 2 * (4 + 5.5)),
        ({**counts([1, 2], [1, 9]), "hidden": torch.full((16,), 0.5)}, 2 + 3 + 1 + 2),
        ({"hidden": torch.zeros(16)}, 2 * (3 + 4)),
    ],
)
def test_times_are_on_the_lines_between_the_points(keep, time):
    assert TABLE.time(keep).item() == pytest.approx(time)
    assert TABLE.saved(keep).item() == pytest.approx(1 - time / 24)
    assert TABLE.dense == 24


def test_a_speed_up_is_that_of_the_time():
    keep = counts([1, 2], [1, 9])
    assert TABLE.speed_up(keep).item() == pytest.approx(2.0)
    assert TABLE.saved(keep).item() == pytest.approx(1 - 1 / 2)
    assert TABLE.speed_up(counts([0, 0], [0, 0])).item() == float("inf")


def test_slopes_are_those_of_the_lines():
    keep = {
        "heads": torch.tensor([[0.5, 0.25], [0.75, 0.75]]),
        "neurons": torch.full((2, 17), 0.7),
        "attention": torch.tensor([0.5, 0.9]),
        "feedforward": torch.tensor([0.5, 0.9]),
        "hidden": torch.full((16,), 0.8),
    }
    keep = {unit: value.double().requires_grad_() for unit, value in keep.items()}
    gradients = torch.autograd.grad(TABLE.time(keep), list(keep.values()))
    for (unit, value), gradient in zip(keep.items(), gradients, strict=True):
        moved = value.detach().clone()
        moved.view(-1)[0] += 1e-2
        slope = (TABLE.time({**keep, unit: moved}) - TABLE.time(keep)).item() / 1e-2
        assert gradient.flatten()[0].item() == pytest.approx(slope, rel=1e-3)
        assert slope > 0


def test_a_table_of_one_width_knows_nothing_of_dimensions():
    narrow = Table(**{**vars(TABLE), "widths": (16,), "attention": TABLE.attention[1:], "feedforward": TABLE.feedforward[1:]})
    assert narrow.time({}).item() == 24
    with pytest.raises(AssertionError, match="dimensions"):
        narrow.time({"hidden": torch.ones(16)})


def test_a_table_is_read_as_it_was_saved(tmp_path):
    TABLE.save(tmp_path / "latency.json")
    assert Table.open(tmp_path / "latency.json") == TABLE


def test_noise_does_not_make_a_smaller_block_the_slower():
    rising = _rising(np.array([[0.0, 3, 1, 5], [0.0, 1, 2, 9]]))
    assert rising.tolist() == [[0, 1.5, 2, 5], [0, 1.5, 2, 9]]


@pytest.mark.parametrize(("neurons", "points"), [(1536, 13), (3072, 13), (48, 8), (20, 5), (8, 3)])
def test_the_grid_is_from_nothing_to_all(neurons, points):
    grid = _grid(neurons)
    assert (grid[:2], grid[-1], len(grid)) == ((0, 1), neurons, points)
    assert list(grid) == sorted(set(grid))
    assert {number % 8 for number in grid[2:-1]} <= {0}


@pytest.mark.parametrize("positions", [name for name in SCHEMES if name != "sinusoidal"])
def test_blocks_of_every_scheme_and_of_fewer_dimensions_are_measured(encoder, positions):
    config = encoder(positions=positions).config
    before = config.to_dict()
    table = Table.measure(config, rows=2, length=8, threads=1, repeats=3, widths=(16, 32))
    assert config.to_dict() == before
    assert (table.layers, table.heads, table.neurons) == (3, (0, 1, 2, 3, 4), (0, 1, 8, 16, 24, 32, 40, 48))
    assert (table.rows, table.length, table.threads) == (2, 8, 1)
    for times in (np.array(table.attention), np.array(table.feedforward)):
        assert (np.diff(times, axis=1) >= 0).all()
        assert (np.diff(times, axis=0) >= 0).all()
        assert (times[:, 0] == 0).all()
        assert (times[:, 1] > 0).all()
    prunable = Prunable.of(config)
    keep = {unit: torch.ones(shape) for unit, shape in prunable.shapes.items()}
    assert table.time(keep).item() == pytest.approx(table.dense, rel=1e-5)


def test_rows_longer_than_the_models_positions_are_refused(encoder):
    with pytest.raises(UserError, match="rows of 17 tokens are to be timed, the model has positions for 16"):
        Table.measure(encoder().config, rows=1, length=17)
