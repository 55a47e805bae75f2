"""A task: labelled examples in three splits, what their labels are, and how predictions are scored."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from pipeline import artifacts
from pipeline.corpus import embedded
from pipeline.errors import UserError
from pipeline.tasks import glue, questions, tables
from pipeline.tasks.encoded import Encoded, row_of, told_apart
from pipeline.tasks.questions import QuestionTask
from pipeline.tasks.settings import TaskSettings
from pipeline.tasks.tables import Columns, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """label: number of the class, or the number to predict."""

    text: str
    text_pair: str | None
    label: int | float


@dataclass(frozen=True)
class Task:
    """Labels, or numbers, of texts.

    splits: `train`, `dev`, `test`, of MNLI also `mismatched`. labels: names of the classes, numbered in this order, none in a regression.
    metrics: scores to report, the first as the task's own. remarks: what was done to the files, for a person to know.
    """

    splits: dict[str, list[Example]]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    max_length: int
    remarks: tuple[str, ...] = ()

    head: ClassVar[Literal["classification"]] = "classification"

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def metric(self) -> str:
        return self.metrics[0]

    def save(self, path: Path) -> None:
        """Keep the task as it was used, so that what comes after is trained and scored on the very same examples."""
        splits = {split: [astuple(example) for example in examples] for split, examples in self.splits.items()}
        about = {"labels": self.labels, "metrics": self.metrics, "max_length": self.max_length, "remarks": self.remarks}
        artifacts.write_json(path, {"kind": "labels", **about, "splits": splits})

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Task:
        """What `save` wrote."""
        splits = {split: [Example(*example) for example in examples] for split, examples in kept["splits"].items()}
        return cls(splits, tuple(kept["labels"]), tuple(kept["metrics"]), kept["max_length"], tuple(kept["remarks"]))

    def encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """A row an example, `labels` int64 [rows], or float32 in a regression. Inputs beyond `max_length` are cut, the longer text first."""
        pairs = [example.text_pair for example in examples] if examples[0].text_pair is not None else None
        found = tokenizer([example.text for example in examples], pairs, truncation=True, max_length=self.max_length, return_token_type_ids=True)
        labels = np.array([example.label for example in examples], dtype=np.float32 if self.regression else np.int64)
        tokens, types = ([row_of(row) for row in found[name]] for name in ("input_ids", "token_type_ids"))
        return Encoded(tokens, told_apart(types), {"labels": labels})


AnyTask = Task | QuestionTask


def load(settings: TaskSettings, seed: int) -> AnyTask:
    """Read the task's files, or the embedded task.

    Without a dev split, `dev_fraction` of train is held out, drawn by seed; without a test split, dev is it.
    Raises UserError naming file and line for a label that is not a number, or that train does not know.
    """
    task: AnyTask
    if settings.squad:
        task = questions.load(settings.squad, settings.length)
    elif settings.glue:
        task = _glue(settings, seed)
    else:
        task = _tables(settings, seed)
    if settings.max_train is None:
        return task
    train = task.splits["train"]
    kept = [train[number] for number in sorted(_drawn(len(train), seed)[: settings.max_train])]
    return replace(task, splits={**task.splits, "train": kept})  # type: ignore[arg-type]


def open(path: Path) -> AnyTask:
    """What a task's `save` wrote. Raises UserError when it cannot be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kinds: dict[str, type[Task] | type[QuestionTask]] = {"labels": Task, "questions": QuestionTask}
        return kinds[kept["kind"]].of(kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not a readable task ({error!r}); remove {path.parent} and run finetune again") from None


def _glue(settings: TaskSettings, seed: int) -> Task:
    assert settings.glue is not None
    assert settings.directory is not None
    task = glue.TASKS[settings.glue]
    layout, files = glue.find(settings.glue, settings.directory)
    broken: list[str] | None = [] if task.broken_lines else None
    records = {split: tables.read(path, layout.columns(settings.glue), broken) for split, path in files.items()}
    remarks = [f"{len(broken)} lines of another number of columns passed over, the first at {broken[0]}"] if broken else []
    return _task(records, task.labels, task.metrics, settings, seed, remarks)


def _tables(settings: TaskSettings, seed: int) -> Task:
    if settings.embedded:
        splits = embedded.task_splits(seed)
        records = {split: [Record(text, None, label, "embedded task") for text, label in rows] for split, rows in splits.items()}
    else:
        columns = Columns(settings.text, settings.text_pair, settings.label, settings.quoting)
        files = {"train": settings.train, "dev": settings.dev, "test": settings.test}
        records = {split: tables.read(path, columns) for split, path in files.items() if path is not None}
    if settings.kind == "regression":
        usual: tuple[str, ...] = ("spearman", "pearson")
        labels: tuple[str, ...] = ()
    else:
        usual, labels = ("accuracy",), _names({record.label for record in records["train"]})
        if len(labels) < 2:
            raise UserError(f"{settings.train}: every label is {labels[0]!r}, there is nothing to tell apart; is task.label the right column?")
    metrics = tuple(dict.fromkeys((settings.metric or usual[0], *usual)))
    return _task(records, labels, metrics, settings, seed, [])


def _task(
    records: dict[str, list[Record]], labels: tuple[str, ...], metrics: tuple[str, ...], settings: TaskSettings, seed: int, remarks: list[str]
) -> Task:
    splits = {split: [Example(record.text, record.text_pair, _label(record, labels)) for record in rows] for split, rows in records.items()}
    if "dev" not in splits:
        count = len(splits["train"])
        splits["train"], splits["dev"] = _hold_out(splits["train"], settings, seed)
        remarks = [*remarks, f"no development split: {len(splits['dev'])} of {count} training examples are held out for it"]
    splits.setdefault("test", splits["dev"])
    return Task(splits, labels, metrics, settings.length, tuple(remarks))


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
            raise UserError(f"{record.where}: label {record.label!r} is not among the task's ({known}); correct it, or the column it is read from")
        return labels.index(record.label)
    try:
        value = float(record.label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{record.where}: label {record.label!r} is not a number; correct it, or the column it is read from")
    return value


def _hold_out(examples: list[Example], settings: TaskSettings, seed: int) -> tuple[list[Example], list[Example]]:
    count = math.ceil(settings.dev_fraction * len(examples))
    if count >= len(examples):
        where = settings.train or settings.directory
        raise UserError(f"{where}: {len(examples)} examples, too few to hold {settings.dev_fraction:g} of them out; give a development split")
    held_out = set(_drawn(len(examples), seed)[:count])
    return (
        [example for number, example in enumerate(examples) if number not in held_out],
        [example for number, example in enumerate(examples) if number in held_out],
    )


def _drawn(count: int, seed: int) -> list[int]:
    return [int(number) for number in np.random.Generator(np.random.Philox(seed)).permutation(count)]
