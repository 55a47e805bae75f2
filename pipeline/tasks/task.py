"""A task: labelled examples in three splits, what their labels are, and how predictions are scored."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from pipeline import artifacts
from pipeline.corpus import embedded
from pipeline.errors import UserError
from pipeline.tasks import tables
from pipeline.tasks.settings import TaskSettings
from pipeline.tasks.tables import Record


@dataclass(frozen=True)
class Example:
    """label: number of the class, or the number to predict."""

    text: str
    text_pair: str | None
    label: int | float


@dataclass(frozen=True)
class Task:
    """splits: `train`, `dev`, `test`; labels: names of the classes, numbered in this order, none in a regression."""

    splits: dict[str, list[Example]]
    labels: tuple[str, ...]
    metric: str
    max_length: int

    @property
    def regression(self) -> bool:
        return not self.labels

    def save(self, path: Path) -> None:
        """Keep the task as it was used, so that what comes after is trained and scored on the very same examples."""
        splits = {split: [astuple(example) for example in examples] for split, examples in self.splits.items()}
        artifacts.write_json(path, {"labels": self.labels, "metric": self.metric, "max_length": self.max_length, "splits": splits})

    @classmethod
    def open(cls, path: Path) -> Task:
        """What `save` wrote. Raises UserError when it cannot be read."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            splits = {split: [Example(*example) for example in examples] for split, examples in kept["splits"].items()}
            return cls(splits, tuple(kept["labels"]), kept["metric"], kept["max_length"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a readable task ({error!r}); remove {path.parent} and run finetune again") from None


def load(settings: TaskSettings, seed: int) -> Task:
    """Read the task's files, or the embedded task.

    Without a dev split, `dev_fraction` of train is held out, drawn by seed; without a test split, dev is it.
    Raises UserError naming file and line for a label that is not a number, or that train does not know.
    """
    records = _records(settings, seed)
    labels: tuple[str, ...] = ()
    if settings.kind == "classification":
        labels = _names({record.label for record in records["train"]})
        if len(labels) < 2:
            raise UserError(f"{settings.train}: every label is {labels[0]!r}, there is nothing to tell apart; is task.label the right column?")
    splits = {split: [Example(record.text, record.text_pair, _label(record, labels)) for record in rows] for split, rows in records.items()}
    if "dev" not in splits:
        splits["train"], splits["dev"] = _hold_out(splits["train"], settings, seed)
    splits.setdefault("test", splits["dev"])
    if settings.max_train is not None:
        splits["train"] = [splits["train"][number] for number in sorted(_drawn(len(splits["train"]), seed)[: settings.max_train])]
    metric = settings.metric or ("accuracy" if labels else "spearman")
    return Task(splits, labels, metric, settings.max_length)


def _records(settings: TaskSettings, seed: int) -> dict[str, list[Record]]:
    if settings.embedded:
        return {split: [Record(text, None, label, "embedded task") for text, label in rows] for split, rows in embedded.task_splits(seed).items()}
    files = {"train": settings.train, "dev": settings.dev, "test": settings.test}
    return {split: tables.read(path, settings) for split, path in files.items() if path is not None}


def _names(labels: set[str]) -> tuple[str, ...]:
    """Numbers by size, other names by alphabet."""
    try:
        return tuple(sorted(labels, key=float))
    except ValueError:
        return tuple(sorted(labels))


def _label(record: Record, labels: Sequence[str]) -> int | float:
    if labels:
        if record.label not in labels:
            known = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            raise UserError(f"{record.where}: label {record.label!r} is not among those of train ({known}); correct one of the two files")
        return labels.index(record.label)
    try:
        value = float(record.label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{record.where}: label {record.label!r} is not a number; correct it, or set task.kind: classification")
    return value


def _hold_out(examples: list[Example], settings: TaskSettings, seed: int) -> tuple[list[Example], list[Example]]:
    count = math.ceil(settings.dev_fraction * len(examples))
    if count >= len(examples):
        raise UserError(f"{settings.train}: {len(examples)} examples, too few to hold {settings.dev_fraction:g} of them out; give task.dev")
    held_out = set(_drawn(len(examples), seed)[:count])
    return (
        [example for number, example in enumerate(examples) if number not in held_out],
        [example for number, example in enumerate(examples) if number in held_out],
    )


def _drawn(count: int, seed: int) -> list[int]:
    return [int(number) for number in np.random.Generator(np.random.Philox(seed)).permutation(count)]
