from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.training import telemetry
from pipeline.training.telemetry import Telemetry


def record(step: int, loss: float, **rates: Any) -> dict[str, Any]:
    return {"step": step, "loss": loss, "losses": {"mlm": loss}, "lr": 0.1, "grad_norm": 1.0, "side": {}, **rates}


def shown(step: int, loss: float) -> dict[str, Any]:
    return record(step, loss, tokens_per_second=12345.6, rows_per_second=10.0, memory_bytes=1, mfu=None)


def write(logs: Path, start: int, records: list[dict[str, Any]]) -> None:
    writer = Telemetry(logs, title="pretrain", start=start, steps=10)
    writer.record(records)
    writer.close()


def test_after_a_resume_every_step_is_in_the_metrics_once_with_its_new_value(tmp_path):
    write(tmp_path, 0, [record(1, 5.0), record(2, 4.0), record(3, 99.0)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    write(tmp_path, 2, [record(3, 3.0)])
    assert [(line["step"], line["loss"]) for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [
        (1, 5.0), (2, 4.0), (3, 3.0),
    ]  # fmt: skip


def test_tensorboard_forgets_the_steps_that_are_trained_again(tmp_path):
    write(tmp_path, 0, [shown(step, 9.0) for step in (1, 2, 3)])
    time.sleep(1.1)  # event files are told apart, and put in order, by the second they begin in
    write(tmp_path, 1, [shown(2, 1.0)])
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("losses/mlm")] == [(1, 9.0), (2, 1.0)]


def test_the_log_is_one_line_for_the_steps_with_rates(tmp_path, capsys):
    write(tmp_path, 0, [record(1, 5.0), shown(2, 4.25)])
    assert capsys.readouterr().out.splitlines() == ["pretrain: step 2/10  loss 4.2500  lr 1.00e-01  12,346 tok/s  ETA 0:00:00"]


def test_tensorboard_shows_a_ratio_of_the_sums_since_its_last_point_and_none_where_its_kind_was_not_met(tmp_path):
    writer = Telemetry(tmp_path, title="pretrain", start=0, steps=10, ratios={"accuracy": ("hits", "kind")})
    for step, hits, kind in ((1, 0.0, 0.0), (2, 0.125, 0.25), (3, 0.25, 0.25), (4, 0.0, 0.0), (5, 0.5, 1.0)):
        made = record(step, 1.0) if step in (1, 2) else shown(step, 1.0)
        writer.record([made | {"losses": {"hits": hits, "kind": kind}}])
    writer.close()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("losses/accuracy")] == [(3, 0.75), (5, 0.5)]


def test_the_time_left_is_that_of_the_budget_where_it_ends_before_the_steps(tmp_path, capsys):
    writer = Telemetry(tmp_path, title="pretrain", start=0, steps=10**9, time_budget=2.0)
    writer.record([shown(1, 1.0) | {"seconds": 30.0}])
    writer.close()
    assert capsys.readouterr().out.endswith("ETA 0:01:30\n")


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [("NVIDIA H100 80GB HBM3", "bf16", 989e12), ("NVIDIA H100 PCIe", "bf16", 756e12), ("NVIDIA H100", "fp32", None), ("Unheard Of", "bf16", None)],
)
def test_peaks_are_those_of_the_device_in_bf16(name, precision, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert telemetry.peak_flops(torch.device("cuda", 0), precision) == peak
    assert telemetry.peak_flops(torch.device("cpu"), precision) is None
