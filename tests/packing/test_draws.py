from __future__ import annotations

import pytest
import torch

from pipeline.packing import draws

ROWS = torch.arange(500)


def uniform(seed=1, step=0, segment=ROWS, length=400, stream=0):
    return draws.uniform(seed, step, segment, length, stream)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].abs().item()


def test_values_are_uniform_in_the_unit_interval():
    values = uniform()
    assert values.dtype == torch.float32
    assert values.shape == (500, 400)
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=100, min=0, max=1)
    chi_squared = ((counts - 2000) ** 2 / 2000).sum().item()
    assert 55 < chi_squared < 150  # 99 degrees of freedom: 99 +- 14


def test_every_row_and_every_position_has_the_mean_of_uniform_draws():
    values = uniform()
    assert (values.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / 500) ** 0.5
    assert (values.mean(1) - 0.5).abs().max() < 5 * (1 / 12 / 400) ** 0.5


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 1}, {"stream": 1}, {"segment": ROWS + 1}, {"seed": 0, "step": 1}, {"step": 1, "stream": -1}])
def test_another_seed_step_stream_or_segment_gives_uncorrelated_values(other):
    assert correlation(uniform(), uniform(**other)) < 0.01  # 4.5 standard deviations of 200,000 pairs


def test_neighbouring_positions_are_uncorrelated():
    values = uniform()
    for lag in (1, 2, 8):
        assert correlation(values[:, :-lag], values[:, lag:]) < 0.01


def test_a_rows_values_depend_neither_on_its_batch_nor_on_its_padding():
    whole = uniform()
    assert torch.equal(uniform(segment=ROWS[[7, 3]], length=50), whole[[7, 3], :50])


def test_values_are_the_same_for_ever():
    # What a resumed run relies on: a change of the mixing must be noticed.
    assert draws.integers(1, 2, torch.tensor([3]), 4, 5, 1000).tolist() == [[335, 333, 253, 92]]


def test_integers_cover_their_range_evenly():
    values = draws.integers(2**64 - 1, 0, ROWS, 400, 0, 7)
    counts = torch.bincount(values.flatten(), minlength=7)
    assert len(counts) == 7
    assert (counts - 200_000 / 7).abs().max() < 5 * (200_000 / 7) ** 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_values():
    assert torch.equal(uniform(segment=ROWS.cuda()).cpu(), uniform())
