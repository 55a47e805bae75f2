"""GLUE (Wang et al. 2019): its nine tasks as their files are laid out, with the labels and the scores of each.

The files are those of the benchmark's own archive: tab-separated, double quotes literal, the test split without labels, so that the
development split is what is reported. The other layouts are those in which the same data is also met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.tasks.settings import GlueName
from pipeline.tasks.tables import Columns

MISMATCHED = "mismatched"
"""The second development split of MNLI: other genres than those of train."""

TSV = {"train": "train.tsv", "dev": "dev.tsv"}


@dataclass(frozen=True)
class Layout:
    """One way the files of a task are written: split -> name, and the columns of each."""

    text: str | int
    text_pair: str | int | None
    label: str | int
    files: Mapping[str, str]
    quoting: bool = False

    def columns(self, task: str) -> Columns:
        remedy = f"GLUE's {task} has other columns; give its files as they are, or name the columns beside task.train"
        return Columns(self.text, self.text_pair, self.label, self.quoting, remedy)


@dataclass(frozen=True)
class GlueTask:
    """labels: names of the classes as the files write them, none where labels are numbers. metrics: the first is the headline.

    broken_lines: whether the archive's files hold lines of too few columns, which everybody passes over.
    """

    layouts: tuple[Layout, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    broken_lines: bool = False


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_PARAPHRASE = ("#1 String", "#2 String", "Quality")
_MNLI = {"train": "train.tsv", "dev": "dev_matched.tsv", MISMATCHED: "dev_mismatched.tsv"}
_MICROSOFT = {"train": "msr_paraphrase_train.txt", "test": "msr_paraphrase_test.txt"}

TASKS: dict[GlueName, GlueTask] = {
    "CoLA": GlueTask((Layout(3, None, 1, TSV),), ("0", "1"), ("matthews", "accuracy")),
    "SST-2": GlueTask((Layout("sentence", None, "label", TSV),), ("0", "1")),
    "MRPC": GlueTask((Layout(*_PARAPHRASE, TSV), Layout(*_PARAPHRASE, _MICROSOFT)), ("0", "1"), ("accuracy", "f1")),
    "STS-B": GlueTask(
        (Layout(*_PAIR, "score", TSV), Layout(0, 1, 2, {"train": "train.csv", "dev": "dev.csv"}, quoting=True)), (), ("pearson", "spearman")
    ),
    "QQP": GlueTask((Layout("question1", "question2", "is_duplicate", TSV),), ("0", "1"), ("accuracy", "f1"), broken_lines=True),
    "MNLI": GlueTask((Layout(*_PAIR, "gold_label", _MNLI),), ("contradiction", "entailment", "neutral"), broken_lines=True),
    "QNLI": GlueTask((Layout("question", "sentence", "label", TSV),), _ENTAILMENT),
    "RTE": GlueTask((Layout(*_PAIR, "label", TSV),), _ENTAILMENT),
    "WNLI": GlueTask((Layout(*_PAIR, "label", TSV),), ("0", "1")),
}


def find(name: GlueName, directory: str | Path) -> tuple[Layout, dict[str, Path]]:
    """The layout in which a task's files lie in a directory, and split -> file. Only `train` need be there, and of MNLI all or no development splits.

    Raises UserError naming the files that are missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "no such directory"
        raise UserError(f"{directory}: {found}; set task.directory to where GLUE's {name} is")
    for layout in TASKS[name].layouts:
        files = {split: path for split, file in layout.files.items() if (path := _file(directory, file)) is not None}
        if "train" not in files:
            continue
        development = [split for split in layout.files if split in ("dev", MISMATCHED)]
        missing = [layout.files[split] for split in development if split not in files]
        if missing and len(missing) < len(development):
            raise UserError(f"{directory}: no {missing[0]} (nor {missing[0]}.gz) beside the other development split of {name}; give both, or neither")
        return layout, files
    wanted = ", nor ".join(f"{layout.files['train']} (.gz)" for layout in TASKS[name].layouts)
    there = ", ".join(sorted(path.name for path in directory.iterdir())[:10]) or "nothing"
    raise UserError(f"{directory}: no {wanted}, the training split of GLUE's {name}; found {there}: set task.directory to where its files are")


def _file(directory: Path, name: str) -> Path | None:
    return next((path for path in (directory / name, directory / f"{name}.gz") if path.is_file()), None)
