"""The `task` of a recipe: a labelled table, or the embedded one."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting


class TaskSettings(Settings):
    """Classification or regression of a text or a pair of texts."""

    embedded: bool = setting(False, "Which package does this docstring come from, with held-out modules.")
    train: str | None = setting(None, "Training split: .tsv, .csv, .json or .jsonl, also .gz.")
    dev: str | None = setting(None, "Development split; default: drawn from train.")
    test: str | None = setting(None, "Test split; default: the development split.")
    kind: Literal["classification", "regression"] = setting("classification", "Labels are names, or numbers.")
    text: str | int = setting("text", "Column of the text: a header's name, or a number from 0 where there is no header.")
    text_pair: str | int | None = setting(None, "Column of the second text.")
    label: str | int = setting("label", "Column of the label.")
    quoting: bool = setting(True, "In .csv and .tsv, double quotes enclose fields; false where they are literal.")
    max_length: int = setting(128, "Longer inputs are cut, the longer text first.", unit="tokens", ge=8)
    max_train: int | None = setting(None, "Use at most this many training examples, drawn by seed.", unit="examples", ge=1)
    dev_fraction: float = setting(0.1, "Share of train held out when there is no dev split.", gt=0, lt=1)
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman"] | None = setting(
        None, "Score to report; default: accuracy, or spearman for regression."
    )

    @model_validator(mode="after")
    def _one_source(self) -> TaskSettings:
        if self.embedded == (self.train is not None):
            raise ValueError("give either embedded: true or train: FILE")
        if self.metric in ("pearson", "spearman") and self.kind == "classification":
            raise ValueError(f"metric {self.metric} needs kind: regression")
        if self.metric in ("accuracy", "f1", "matthews") and self.kind == "regression":
            raise ValueError(f"metric {self.metric} needs kind: classification")
        return self
