"""The arms of `acceleration.py`: sizes, what each differs in, and training by the pretrain stage with the models kept along the way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from acceleration_data import rare_until, tokens_of

from pipeline import recipe as recipes
from pipeline import workflow
from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.store import Store
from pipeline.launch.ranks import Ranks
from pipeline.models import export
from pipeline.packing.plan import Plan
from pipeline.stages import pretrain as pretrain_stage
from pipeline.training import engine as engines
from pipeline.training import loop

# -- sizes and arms ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What all arms of a comparison share. values, probes, finetuned: evenly spaced points of the training at which that is measured."""

    name: str
    sources: tuple[str, ...]
    vocabulary: int
    model: dict[str, Any]
    length: int
    batch: int
    micro_batch: int
    steps: int
    lr: float
    warm_lr: float
    deepspeed: str
    ppmi: bool
    baselines: tuple[str, ...]
    arms: tuple[str, ...]
    values: int = 16
    probes: int = 4
    finetuned: int = 1
    finetuning: dict[str, Any] = field(default_factory=dict)
    finetuning_examples: int | None = None


@dataclass(frozen=True)
class Kind:
    """How an arm differs from plain BERT.

    positions, untie_cls: its scheme. sines: the table of absolute positions starts as sinusoids. lr: times the size's. notes: as in a recipe;
    `frequency: fifth` is from 100 on, as many words as bring one into a fifth of the rows. warm: the arm from whose weights at half of its steps
    it goes on, for the other half, with the texts that come after those.
    """

    positions: str = "absolute"
    untie_cls: bool = True
    sines: bool = False
    lr: float = 1.0
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "mlm"})
    notes: dict[str, Any] | None = None
    warm: str | None = None


MC: dict[str, Any] = {"name": "meta_controller"}
ELECTRA: dict[str, Any] = {"name": "electra"}
FIFTH: dict[str, Any] = {"frequency": "fifth"}
SINES: dict[str, Any] = {"sines": True}
TUPE: dict[str, Any] = {"positions": "tupe-relative"}
KINDS: dict[str, Kind] = {
    "plain": Kind(),
    "plain-2lr": Kind(lr=2),
    "plain-sin": Kind(**SINES),
    "plain-sin-2lr": Kind(**SINES, lr=2),
    "plain-sin-4lr": Kind(**SINES, lr=4),
    "rope": Kind("rope"),
    "alibi": Kind("alibi"),
    "absolute-relative": Kind("absolute-relative"),
    "absolute-relative-sin": Kind("absolute-relative", **SINES),
    "tupe-absolute": Kind("tupe-absolute"),
    "tupe-relative": Kind(**TUPE),
    "tied-cls": Kind(**TUPE, untie_cls=False),
    "tupe-relative-2lr": Kind(**TUPE, lr=2),
    "tupe-relative-4lr": Kind(**TUPE, lr=4),
    "notes": Kind(notes=FIFTH),
    "tupe-notes": Kind(**TUPE, notes=FIFTH),
    "tupe-notes-wide": Kind(**TUPE, notes={"frequency": [100, 500]}),
    "tupe-notes-off": Kind(**TUPE, notes={"frequency": [100, 500], "weight": 0.0}),
    "mc": Kind(objective=MC),
    "notes-mc": Kind(notes=FIFTH, objective=MC),
    "electra": Kind(objective=ELECTRA),
    "tupe-mc": Kind(**TUPE, objective=MC),
    "tupe-notes-mc": Kind(**TUPE, notes=FIFTH, objective=MC),
    "tupe-electra": Kind(**TUPE, objective=ELECTRA),
    "warm": Kind(**SINES, warm="plain-sin"),
    "warm-notes": Kind(**SINES, warm="plain-sin", notes=FIFTH),
    "warm-mc": Kind(**SINES, warm="plain-sin", objective=MC),
    "warm-notes-mc": Kind(**SINES, warm="plain-sin", notes=FIFTH, objective=MC),
    "warm-electra": Kind(**SINES, warm="plain-sin", objective=ELECTRA),
    "warm-tupe": Kind(**TUPE, warm="tupe-relative"),
    "warm-tupe-notes": Kind(**TUPE, warm="tupe-relative", notes=FIFTH),
    "warm-tupe-mc": Kind(**TUPE, warm="tupe-relative", objective=MC),
    "warm-tupe-notes-mc": Kind(**TUPE, warm="tupe-relative", notes=FIFTH, objective=MC),
    "warm-tupe-electra": Kind(**TUPE, warm="tupe-relative", objective=ELECTRA),
}
SIZES = {
    "small": Size(
        "small", ("wikipedia/train.jsonl.gz",), vocabulary=2048, length=64, batch=64, micro_batch=64, steps=800, lr=3e-3, warm_lr=2e-3,
        model={"layers": 2, "hidden": 64, "heads": 4, "ffn": 256, "dropout": 0.0, "init_std": 0.07}, deepspeed="zero0", ppmi=True,
        baselines=("plain", "plain-2lr", "plain-sin", "plain-sin-2lr", "plain-sin-4lr"),
        arms=(
            "plain", "plain-2lr", "plain-sin", "plain-sin-2lr", "plain-sin-4lr", "rope", "absolute-relative", "tupe-absolute", "tied-cls",
            "tupe-relative", "tupe-relative-2lr", "tupe-relative-4lr", "tupe-notes-wide", "tupe-notes-off",
            *(name for name in KINDS if name.startswith("warm")),
        ),
        finetuning={"lr": 5e-4, "epochs": 2}, finetuning_examples=6000,
    ),
    "large": Size(
        "large", ("wikipedia/train.jsonl.gz", "books/train.jsonl.gz"), vocabulary=8192, length=128, batch=256, micro_batch=256, steps=10_000,
        lr=1e-3, warm_lr=1e-3, model={"layers": 6, "hidden": 384, "heads": 6, "ffn": 1536, "dropout": 0.0}, deepspeed="zero1-bf16", ppmi=False,
        baselines=("plain", "plain-2lr"),
        arms=(
            "plain", "tupe-relative", "tupe-mc", "mc", "notes", "tupe-notes", "notes-mc", "tupe-notes-mc", "electra", "tupe-electra", "plain-2lr",
            "absolute-relative", "tupe-absolute",
        ),
        values=10, finetuned=2, finetuning={"lr": 1e-4, "epochs": 3}, finetuning_examples=10_000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One training of one seed, and where its things are. `data`: the folder of texts and tasks; `work`: where all is made."""

    name: str
    seed: int
    size: Size
    data: Path
    work: Path

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def steps(self) -> int:
        return self.size.steps // 2 if self.kind.warm else self.size.steps

    def points(self, count: int) -> list[int]:
        """`count` evenly spaced numbers of steps, the last of them all."""
        return [self.steps * (number + 1) // count for number in range(count)]

    @property
    def warm_from(self) -> Arm | None:
        return Arm(self.kind.warm, self.seed, self.size, self.data, self.work) if self.kind.warm else None

    @cached_property
    def recipe(self) -> recipes.Recipe:
        """The recipe, also written down as a file that `trimline pretrain` runs."""
        notes = self.kind.notes
        if notes is not None and notes["frequency"] == "fifth":
            notes = notes | {"frequency": [100, rare_until(self)]}
        content = self.shared() | {
            "model": self.model if self.start is None else {"from": str(self.start)},
            "pretrain": {
                "objective": self.kind.objective,
                "notes": notes,
                "steps": self.steps,
                "batch_size": self.size.batch,
                "micro_batch_size": self.size.micro_batch,
                "lr": (self.size.warm_lr if self.kind.warm else self.size.lr) * self.kind.lr,
                "warmup_ratio": 0.1,
                "schedule": "linear",
                "gradient_clipping": 0.0 if self.size.ppmi else 1.0,
                "deepspeed": self.size.deepspeed,
                "log_every": 20,
                "checkpoint_every": max(self.steps // 4, 1),
            },
        }
        return self._written(content, self.name)

    @property
    def corpus(self) -> recipes.Recipe:
        """The stages before training: the same for all arms of a seed."""
        return self._written(self.shared(), "corpus")

    def shared(self) -> dict[str, Any]:
        size = self.size
        return {
            "name": size.name,
            "seed": self.seed,
            "runs_dir": str(self.work / "runs"),
            "tokenize": {
                "sources": [str(self.work / f"{size.name}.jsonl")],
                "validation": 0.05,
                "tokenizer": "unigram",
                "vocab_size": size.vocabulary,
                "deduplicate": None,
            },
            "pack": {"length": size.length},
        }

    def _written(self, content: dict[str, Any], name: str) -> recipes.Recipe:
        path = self.work / "recipes" / f"{self.size.name}-{name}-{self.seed}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # other processes may read it
        unfinished.write_text(yaml.safe_dump(content, sort_keys=False))
        unfinished.rename(path)
        return recipes.load(path)

    def artifact(self, stage: str, recipe: recipes.Recipe | None = None) -> Any:
        return next(step.artifact for step in workflow.resolve(recipe or self.corpus) if step.stage == stage)

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizers.load(self.artifact("tokenize").path / "tokenizer")

    @cached_property
    def unigram(self) -> np.ndarray:
        """float32 [vocabulary]: the tokens' shares of the training text, one occurrence of each added."""
        path = self.work / f"{self.size.name}-unigram-{self.seed}.npy"
        if not path.exists():
            counts = np.bincount(tokens_of(self.store("train")), minlength=len(self.tokenizer)) + 1.0
            np.save(path, (counts / counts.sum()).astype(np.float32))
        return np.load(path)

    def store(self, split: str) -> Store:
        return Store.open(self.artifact("tokenize").path / split)

    def plan(self, split: str) -> Plan:
        return Plan.open(self.artifact("pack").path / split)

    @property
    def model(self) -> dict[str, Any]:
        """The recipe's section of a model with new weights."""
        return {"positions": self.kind.positions, "untie_cls": self.kind.untie_cls, "max_length": self.size.length, **self.size.model}

    @property
    def start(self) -> Path | None:
        """The weights it starts from, where they are not simply drawn."""
        if self.warm_from is not None:
            return self.warm_from.snapshot(self.warm_from.steps // 2)
        if not (self.size.ppmi or self.kind.sines):
            return None
        parts = [self.size.name, self.kind.positions, *["tied"] * (not self.kind.untie_cls), *["sines"] * self.kind.sines, str(self.seed)]
        return self.work / "starts" / "-".join(parts)

    @cached_property
    def identity(self) -> str:
        """Name of what its pretraining makes."""
        return next(step.name for step in workflow.resolve(self.recipe) if step.stage == "pretrain")

    def snapshot(self, step: int) -> Path:
        """The model after that many steps."""
        return self.recipe.directory / "snapshots" / self.identity / f"step-{step:08d}"

    @property
    def bits(self) -> bytes:
        """The trained weights as they are on disk."""
        return (self.snapshot(self.steps) / "model.safetensors").read_bytes()

    @property
    def logs(self) -> Path:
        return self.recipe.directory / "logs" / self.identity


# -- training ----------------------------------------------------------------------------------------------------------


class Watched:
    """Batches of a loader, from step `first` on; tells `keep` which step is about to be taken."""

    def __init__(self, batches: loop.Batches, first: int, keep: Callable[[int], None]):
        self.batch_size, self.unit = batches.batch_size, batches.unit
        self.fingerprint = f"{batches.fingerprint} from {first}"
        self._batches, self._first, self._keep = batches, first, keep

    def batch(self, step: int, rank: int, world: int) -> dict[str, np.ndarray]:
        self._keep(step)
        return self._batches.batch(self._first + step, rank, world)


def train(arm: Arm) -> None:
    """The pretrain stage, which leaves the models of all points besides."""
    points = {0, *arm.points(arm.size.values), *arm.points(arm.size.probes), *arm.points(arm.size.finetuned), arm.steps // 2}
    first = arm.warm_from.steps // 2 if arm.warm_from else 0

    def watched(trainee: Any, batches: loop.Batches, *given: Any, **named: Any) -> loop.Summary:
        def keep(step: int) -> None:
            if step in points and not arm.snapshot(step).exists():
                _save(arm, step, trainee, engines.full_weights(None, trainee.model))

        summary = loop.train(trainee, Watched(batches, first, keep), *given, **named)
        _save(arm, arm.steps, trainee, summary.weights)
        return summary

    with mock.patch.object(pretrain_stage, "train", watched):
        workflow.execute(arm.recipe, "pretrain", Ranks())


def _save(arm: Arm, step: int, trainee: Any, weights: dict[str, torch.Tensor] | None) -> None:
    place = arm.snapshot(step)
    partial = place.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    export.save(trainee.model, arm.tokenizer, partial, weights)
    if trainee.side is not None:
        torch.save(trainee.side.state_dict(), partial / "side.pt")
    if not place.exists():
        partial.rename(place)
