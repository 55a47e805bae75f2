"""Trainings of encoders, as the ranks run them:  python encoder_ranks.py TRAININGS.json

Each training is a real loader over a real plan, a small encoder and one of its objectives.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from documents import Dying, data

from pipeline import objectives
from pipeline.compression.general import GeneralDistillation, Upstream
from pipeline.compression.masks import Masks
from pipeline.compression.settings import SparsitySettings
from pipeline.compression.sparsity import Prunable
from pipeline.compression.student import student
from pipeline.launch.ranks import Ranks, leaving
from pipeline.models import build
from pipeline.models.settings import ModelSettings
from pipeline.objectives.base import Trainee
from pipeline.objectives.notes import Notes
from pipeline.objectives.settings import DistillSettings, ElectraSettings, MetaControllerSettings, MlmSettings, NotesSettings
from pipeline.packing import word_counts
from pipeline.packing.settings import PackSettings
from pipeline.training.loop import train
from pipeline.training.settings import TrainSettings

SETTINGS = {"batch_size": 8, "micro_batch_size": 2, "lr": 5e-3, "log_every": 1, "checkpoint_every": 1000}
SHAPE = {"layers": 2, "hidden": 48, "heads": 3, "ffn": 64, "max_length": 16, "init_std": 0.2}
OBJECTIVES = {"mlm": MlmSettings, "electra": ElectraSettings, "meta_controller": MetaControllerSettings, "distill": DistillSettings}
PACKED = PackSettings(length=SHAPE["max_length"], segments="within", min_tokens=3)


def run(training: dict[str, Any], place: Path) -> None:
    store, tokenizer, plan = data(place / f"data-{Ranks.here().rank}-{training['name']}-{os.getpid()}", PACKED, "encoder")
    hashes, counts = word_counts.count(store, tokenizer)
    rare = hashes[counts < np.median(counts)] if training.get("notes") else None
    batches = Dying(plan, store, tokenizer, SETTINGS["batch_size"], 1, rare=rare)
    batches.dies_at = training.get("dies_at")
    settings = OBJECTIVES[training["objective"]](**training.get("options", {}))
    torch.manual_seed(0)
    model = build.new(ModelSettings(**SHAPE, dropout=training.get("dropout", 0.0), positions=training["positions"]), tokenizer, settings.head)
    if isinstance(settings, DistillSettings):
        teacher, model = model, student(model, settings.student)
        objective = GeneralDistillation(settings, tokenizer, 1, teacher)
    else:
        objective = objectives.build(settings, tokenizer, 1, model=model.config)
    if rare is not None:
        objective.take_notes(Notes(NotesSettings(window=2), len(rare), SHAPE["hidden"], 1))
    side = objective.notes
    if "sparsity" in training:
        side = Masks(Prunable.of(model.config), SparsitySettings(**training["sparsity"]), target=0.5, steps=training["steps"], seed=1)
        objective = Upstream(objective, side)
    directory = place / training["name"]
    trainee = Trainee(model, objective, side=side)
    summary = train(
        trainee, batches, TrainSettings(**SETTINGS | training.get("settings", {})), steps=training["steps"], seed=1,
        directory=directory, logs=directory / "logs", ranks=Ranks.here(), title=training["name"], loss_weights=objective.loss_weights,
    )  # fmt: skip
    if summary.weights is not None:
        torch.save(summary.weights, directory / "weights.pt")


def main() -> None:
    for training in json.loads(Path(sys.argv[1]).read_text()):
        run(training, Path(sys.argv[1]).parent)


if __name__ == "__main__":
    with leaving():
        main()
