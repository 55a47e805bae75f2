"""The prune stage on two ranks is as on one, with ZeRO 0 and 3; killed in any phase it ends in the same bits. Few starts of ranks, many prunings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("prune_ranks.py")
UNITS = ["attention", "feedforward", "heads", "neurons", "hidden"]
SPARSITY = {"units": UNITS, "mask_lr": 0.5}
"""A rate at which masks move in 8 steps."""
FAMILY = {"dropout": 0.1, "prune": {"epochs": 1, "sparsity": {"target": [0.4, 0.6], **SPARSITY}, "distillation": {"augment": 1}}}
LEARNT = {"mapping": "fixed", "hard_labels": 0.1}
ONE = {"dropout": 0.0, "prune": {"epochs": 1, "sparsity": {"target": 0.6, **SPARSITY}, "distillation": {**LEARNT, "augment": 1}}}
"""A mapping that is found is found by each micro-batch for itself, so that losses then depend on how rows are divided."""
SPANS = {"squad": True, "dropout": 0.0, "prune": {"sparsity": ONE["prune"]["sparsity"], "distillation": {**LEARNT, "attention": 0.05}}}
KINDS = {"labels": ONE, "questions": SPANS}
DEATHS = ([0, 5], [1, 1], [2, 3])
"""A training of a family, and its batch: the first target's masks and recovery, the second's masks."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, launch_ranks: Any) -> Path:
    where = tmp_path_factory.mktemp("prune")
    zero3 = json.loads((SCRIPT.parents[2] / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # it keeps small parameters whole; these models have no others
    (where / "zero3.json").write_text(json.dumps(zero3))

    def launch(ranks: int, *runs: dict[str, Any]) -> Any:
        (where / "runs.json").write_text(json.dumps(runs))
        return launch_ranks(SCRIPT, [str(where / "runs.json")], ranks, timeout=500)

    done = launch(1, *({"name": f"{kind}-alone", **asked} for kind, asked in KINDS.items()))
    assert done.returncode == 0, done.stdout + done.stderr
    stages = {"zero0": "zero0", "zero3": str(where / "zero3.json"), "bf16": "zero1-bf16"}
    shared = [{"name": f"{kind}-{stage}", "deepspeed": file, **asked} for kind, asked in KINDS.items() for stage, file in stages.items()]
    done = launch(2, {"name": "whole", **FAMILY}, *shared)
    assert done.returncode == 0, done.stdout + done.stderr
    for death in DEATHS:
        assert launch(2, {"name": "killed", "dies": death, **FAMILY}).returncode != 0
    done = launch(2, {"name": "killed", **FAMILY})
    assert done.returncode == 0, done.stdout + done.stderr
    return where


def losses(directory: Path, phase: str) -> list[dict[str, float]]:
    return [json.loads(line)["losses"] for line in (directory / "logs" / phase / "metrics.jsonl").read_text().splitlines()]


def test_a_family_killed_in_each_of_its_trainings_ends_in_the_same_bits(place):
    for name in ("0.4", "0.6"):
        found, expected = (load_file(place / run / "models" / name / "model.safetensors") for run in ("killed", "whole"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)
        for phase in ("masking", "recovery"):
            assert losses(place / "killed", f"{name}/{phase}") == losses(place / "whole", f"{name}/{phase}")
    assert (place / "killed" / "figures.json").read_text() == (place / "whole" / "figures.json").read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_two_ranks_prune_as_one(kind, stage, place):
    """Four micro-batches a step on one rank, two on each of two, and one draw of masks for all of them."""
    for phase in ("masking", "recovery"):
        found, expected = losses(place / f"{kind}-{stage}", f"0.6/{phase}"), losses(place / f"{kind}-alone", f"0.6/{phase}")
        assert len(found) == (8 if phase == "masking" or kind == "labels" else 4)  # an epoch of the recovery has a copy of each label's example
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=2e-4, rel=1e-4)
    found, expected = (json.loads((place / f"{kind}-{name}" / "structure.json").read_text())[0] for name in (stage, "alone"))
    assert found["layers"] == expected["layers"]


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_the_masks_stay_in_fp32_and_go_where_they_go_in_fp32(kind, place):
    """The script asserts the type; log alpha and the multipliers step by less than bf16 can tell."""
    sides = [
        [json.loads(line)["side"] for line in (place / f"{kind}-{name}" / "logs" / "0.6" / "masking" / "metrics.jsonl").read_text().splitlines()]
        for name in ("bf16", "alone")
    ]
    for name in ("expected_sparsity", "lambda_1_heads", "lambda_2_neurons"):
        assert [row[name] for row in sides[0]] == pytest.approx([row[name] for row in sides[1]], rel=0.05, abs=0.02)
