from __future__ import annotations

import math

import pytest

from pipeline.training.schedules import learning_rate
from pipeline.training.settings import TrainSettings


def rates(steps: int, **settings: object) -> list[float]:
    return [learning_rate(TrainSettings(lr=1.0, **settings), step, steps) for step in range(steps)]


def test_warm_up_rises_linearly_to_the_peak():
    assert rates(10, warmup_ratio=0.4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear_decay_goes_to_the_floor():
    assert rates(4, warmup_ratio=0, min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_decay_is_half_way_down_in_the_middle():
    found = rates(101, warmup_ratio=0, schedule="cosine", min_lr_ratio=0.5)
    assert found[0] == 1.0
    assert found[100] == pytest.approx(0.5, abs=1e-3)
    assert rates(100, warmup_ratio=0, schedule="cosine", min_lr_ratio=0.5)[50] == pytest.approx(0.75)


def test_constant_stays_at_the_peak_whatever_the_floor():
    assert rates(5, warmup_ratio=0.2, schedule="constant", min_lr_ratio=0.1) == [1.0] * 5


def test_inverse_square_root_is_half_the_peak_at_four_times_the_warm_up():
    found = rates(100, warmup_ratio=0.1, schedule="inverse_sqrt")
    assert found[9] == 1.0
    assert found[39] == pytest.approx(0.5)
    assert found[89] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="set warmup_ratio above 0"):
        TrainSettings(schedule="inverse_sqrt", warmup_ratio=0)


def test_warm_up_rises_from_the_share_asked_for():
    assert rates(10, warmup_ratio=0.4, warmup_from=0.2)[:5] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])


def test_a_cosine_after_warm_up_is_fairseqs_of_one_period():
    period, warmup, floor = 270, 16, 1e-4
    found = rates(warmup + period, warmup_ratio=warmup / (warmup + period), schedule="cosine", min_lr_ratio=floor)
    for update in (16, 100, 285):
        assert found[update] == pytest.approx(floor + 0.5 * (1 - floor) * (1 + math.cos(math.pi * (update - warmup) / period)))


def test_wsd_stays_at_the_peak_then_falls_as_one_minus_the_square_root():
    found = rates(20, warmup_ratio=0.1, schedule="wsd", decay_ratio=0.2, min_lr_ratio=0.5)
    assert found[:2] == pytest.approx([0.5, 1.0])
    assert found[2:17] == [1.0] * 15
    assert found[17:] == pytest.approx([1 - 0.5 * math.sqrt(share) for share in (0.25, 0.5, 0.75)])
    assert found[17] == 0.75
    with pytest.raises(ValueError, match=r"warmup_ratio 0\.5 and decay_ratio 0\.6 are more than all steps"):
        TrainSettings(schedule="wsd", warmup_ratio=0.5, decay_ratio=0.6)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "inverse_sqrt", "wsd"])
def test_a_share_of_the_time_budget_counts_as_that_share_of_the_steps_if_it_is_more(schedule):
    settings = TrainSettings(schedule=schedule, warmup_ratio=0.1, time_budget=2.0)
    by_steps = [learning_rate(settings, step, 100) for step in range(100)]
    assert [learning_rate(settings, 0, 100, seconds=1.2 * step) for step in range(100)] == pytest.approx(by_steps)
    assert learning_rate(settings, 60, 100, seconds=48.0) == by_steps[60]
    assert learning_rate(settings.model_copy(update={"time_budget": None}), 5, 100, seconds=60.0) == by_steps[5]
    if schedule != "inverse_sqrt":
        assert learning_rate(settings, 3, 100, seconds=150.0) == 0.0


def test_between_two_steps_of_the_warm_up_the_peak_is_not_passed():
    settings = TrainSettings(lr=1.0, warmup_ratio=0.1, time_budget=1.0)
    assert learning_rate(settings, 0, 100, seconds=60 * 0.095) == 1.0
