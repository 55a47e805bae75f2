"""Trainings with in-batch memory, as the ranks run them:  python trime_ranks.py TRAININGS.json RESULTS.json

Each training is a real loader over a real plan, a small decoder and one of TRIME's objectives.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from documents import Dying, data

from pipeline import objectives
from pipeline.launch.ranks import Ranks, leaving
from pipeline.models import build
from pipeline.models.settings import ModelSettings
from pipeline.objectives.base import Trainee
from pipeline.objectives.settings import TrimeExtSettings, TrimeLongSettings
from pipeline.packing.settings import PackSettings
from pipeline.training.loop import train
from pipeline.training.settings import TrainSettings

SETTINGS = {"batch_size": 16, "micro_batch_size": 4, "lr": 5e-3, "log_every": 1, "checkpoint_every": 1000}
SEGMENT, GROUP = 12, 4
PACKED = PackSettings(length=SEGMENT, segments="within", min_tokens=3, groups="consecutive", group_size=GROUP)


def run(training: dict[str, Any], place: Path) -> None:
    store, tokenizer, plan = data(place / f"data-{Ranks.here().rank}-{training['name']}-{os.getpid()}", PACKED, "decoder")
    together = training.get("ranks_per_group", 1)
    batches = Dying(plan, store, tokenizer, SETTINGS["batch_size"], 1, places=True, ranks_per_group=together)
    batches.dies_at = training.get("dies_at")
    options = {"ce_warmup_ratio": 0.2, **training.get("objective", {})}
    settings = TrimeLongSettings(**options) if training["kind"] == "long" else TrimeExtSettings(**options, local_dropped=0.5)
    torch.manual_seed(0)
    shape = {"layers": 2, "hidden": 32, "heads": 2, "ffn": 64, "max_length": SEGMENT, "init_std": 0.2, "dropout": training.get("dropout", 0.0)}
    model = build.new(ModelSettings(kind="decoder", norm="pre", **shape), tokenizer)
    objective = objectives.build(settings, tokenizer, 1, steps=training["steps"], group_size=GROUP, ranks_per_group=together)
    directory = place / training["name"]
    summary = train(
        Trainee(model, objective), batches, TrainSettings(**SETTINGS | training.get("settings", {})), steps=training["steps"], seed=1,
        directory=directory, logs=directory / "logs", ranks=Ranks.here(), title=training["name"],
    )  # fmt: skip
    if summary.weights is not None:
        torch.save(summary.weights, directory / "weights.pt")


def main() -> None:
    for training in json.loads(Path(sys.argv[1]).read_text()):
        run(training, Path(sys.argv[1]).parent)


if __name__ == "__main__":
    with leaving():
        main()
