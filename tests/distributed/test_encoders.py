"""Encoders of every objective on two ranks: losses, and the weights they lead to, are those of one rank. Few starts of ranks, many trainings each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("encoder_ranks.py")
STEPS = 3
KINDS = {
    f"{objective}{suffix}": {"objective": objective, **options}
    for objective in ("mlm", "electra", "meta_controller")
    for suffix, options in (("", {"positions": "absolute"}), ("-tupe-notes", {"positions": "tupe-relative", "notes": True}))
}
KINDS["distill"] = {
    "objective": "distill",
    "positions": "absolute",
    "options": {"student": {"layers": 1, "heads": 2, "ffn": 32}, "hard_labels": 0.5, "attention": 0.1},
}
KINDS["mlm-sparsity"] = {"objective": "mlm", "positions": "absolute", "sparsity": {"prepruning_ratio": 0.0, "warmup_ratio": 0.5}}
EAGER = {"stage3_param_persistence_threshold": 0}
"""ZeRO-3 keeps small parameters whole; these models have no others."""
KILLED = {**KINDS["meta_controller-tupe-notes"], "dropout": 0.1, "settings": {"deepspeed": "zero1", "checkpoint_every": 1}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, launch_ranks: Any) -> Path:
    where = tmp_path_factory.mktemp("encoders")
    zero3 = json.loads((SCRIPT.parents[2] / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"] |= EAGER
    (where / "zero3.json").write_text(json.dumps(zero3))
    recomputed = {"deepspeed": str(where / "zero3.json"), "activation_checkpointing": True}

    def launch(ranks: int, *trainings: dict[str, Any]) -> Any:
        (where / "trainings.json").write_text(json.dumps([{"steps": STEPS, **training} for training in trainings]))
        return launch_ranks(SCRIPT, [str(where / "trainings.json")], ranks, timeout=500)

    done = launch(1, *({"name": f"{name}-alone", **kind} for name, kind in KINDS.items()))
    assert done.returncode == 0, done.stdout + done.stderr
    stages = {"zero0": {"deepspeed": "zero0"}, "zero3": recomputed}
    shared = [{"name": f"{name}-{stage}", "settings": settings, **kind} for name, kind in KINDS.items() for stage, settings in stages.items()]
    done = launch(2, {"name": "whole", **KILLED}, *shared)
    assert done.returncode == 0, done.stdout + done.stderr
    assert launch(2, {"name": "killed", "dies_at": 2, **KILLED}).returncode != 0
    done = launch(2, {"name": "killed", **KILLED})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed: goes on after step 2" in done.stdout
    return where


def losses(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line)["losses"] for line in (directory / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_train_an_encoder_as_one_rank(name, stage, place):
    """With ZeRO-3 also with activations computed again, by the generator's layers too."""
    found, expected = losses(place / f"{name}-{stage}"), losses(place / f"{name}-alone")
    assert len(found) == STEPS
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    weights = torch.load(place / f"{name}-alone" / "weights.pt")
    for parameter, tensor in torch.load(place / f"{name}-{stage}" / "weights.pt").items():
        if parameter.endswith("attention.key.bias"):  # softmax does not see it: its gradient is rounding, which Adam makes large
            continue
        torch.testing.assert_close(tensor, weights[parameter], atol=2e-5, rtol=1e-4)


def test_after_kill_9_training_with_controller_and_notes_goes_on_bit_for_bit(place):
    assert losses(place / "killed") == losses(place / "whole")
    found, expected = (torch.load(place / name / "weights.pt") for name in ("killed", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    sides = [
        [json.loads(line)["side"] for line in (place / name / "logs" / "metrics.jsonl").read_text().splitlines()] for name in ("killed", "whole")
    ]
    assert sides[0] == sides[1]
    assert sides[0][-1], "no notes were taken"
