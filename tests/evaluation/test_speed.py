import time

import torch
from torch import nn

from pipeline.evaluation.settings import LatencySettings
from pipeline.evaluation.speed import latency
from pipeline.models.stopwatch import WARM_UP


class Sleeper(nn.Module):
    """Takes a known time; the first ones twenty times as long, as on a cold machine."""

    def __init__(self, milliseconds, positions=64):
        super().__init__()
        self.milliseconds, self.passes = milliseconds, []
        self.config = type("Config", (), {"max_position_embeddings": positions})

    def forward(self, input_ids):
        self.passes.append((time.perf_counter(), input_ids, self.training, torch.get_num_threads()))
        time.sleep(self.milliseconds * (20 if len(self.passes) <= WARM_UP else 1) / 1000)


SETTINGS = LatencySettings(batch_size=2, length=16, repeats=5)


def test_the_median_is_the_time_of_a_warm_pass():
    measured = latency({"slow": Sleeper(6), "fast": Sleeper(2)}, SETTINGS, vocab=10)
    slow, fast = measured["milliseconds"]["slow"], measured["milliseconds"]["fast"]
    assert 6 <= slow["median"] < 60  # cold passes take 120
    assert 2 <= fast["median"] < slow["median"]
    assert slow["upper_quartile"] < 120
    assert slow["lower_quartile"] <= slow["median"] <= slow["upper_quartile"]
    assert measured["speed_up"] == {"slow": 1.0, "fast": slow["median"] / fast["median"]}
    assert measured["device"]
    assert (measured["batch_size"], measured["length"], measured["repeats"]) == (2, 16, 5)


def test_models_take_turns_on_the_same_rows_in_evaluation_mode():
    one, other = Sleeper(0).train(), Sleeper(0)
    latency({"one": one, "other": other}, SETTINGS, vocab=10)
    assert len(one.passes) == len(other.passes) == WARM_UP + 5
    assert all(first[0] < second[0] for first, second in zip(one.passes, other.passes, strict=True))
    assert all(second[0] < first[0] for second, first in zip(other.passes, one.passes[1:], strict=False))
    assert torch.equal(one.passes[0][1], other.passes[-1][1])
    assert one.passes[0][1].shape == (2, 16)
    assert one.passes[0][1].max() < 10
    assert not any(passed[2] for passed in one.passes)


def test_threads_are_set_reported_and_put_back():
    before, model = torch.get_num_threads(), Sleeper(0)
    wanted = before + 1
    measured = latency({"one": model}, SETTINGS.model_copy(update={"threads": wanted}), vocab=10)
    assert measured["threads"] == wanted == model.passes[0][3]
    assert torch.get_num_threads() == before


def test_rows_are_no_longer_than_a_model_allows():
    assert latency({"one": Sleeper(0, positions=9)}, SETTINGS, vocab=10)["length"] == 9
