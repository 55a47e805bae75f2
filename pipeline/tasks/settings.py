"""The `task` of a recipe: a labelled table, a task of GLUE, SQuAD, or the embedded one."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting

GlueName = Literal["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI"]

MAX_QUESTION = 64
"""Tokens; what is longer of a question is cut, as BERT's own script does."""
AROUND = 4
"""Special tokens of a window, at most: RoBERTa's."""


class SquadSettings(Settings):
    """SQuAD 1.1: the answer is a span of the context."""

    train: str = setting(..., "Training split in SQuAD's own layout: .json, also .gz.")
    dev: str = setting(..., "Development split, likewise.")
    doc_stride: int = setting(128, "Tokens that a window of a long context shares with the one before it.", unit="tokens", ge=0)
    max_answer: int = setting(30, "Longer answers are not given.", unit="tokens", ge=1)


class TaskSettings(Settings):
    """Classification or regression of a text or a pair of texts, or answers to questions about a text."""

    embedded: bool = setting(False, "Which package does this docstring come from, with held-out modules.")
    train: str | None = setting(None, "Training split: .tsv, .csv, .json or .jsonl, also .gz.")
    dev: str | None = setting(None, "Development split; default: drawn from train.")
    test: str | None = setting(None, "Test split; default: the development split.")
    glue: GlueName | None = setting(None, "A task of GLUE, with its columns, labels and scores; give its directory.")
    directory: str | None = setting(None, "Where GLUE's files of that task are, as GLUE names them, also .gz.")
    squad: SquadSettings | None = setting(None, "Questions about a text: SQuAD 1.1.")
    kind: Literal["classification", "regression"] = setting("classification", "Labels are names, or numbers.")
    text: str | int = setting("text", "Column of the text: a header's name, or a number from 0 where there is no header.")
    text_pair: str | int | None = setting(None, "Column of the second text.")
    label: str | int = setting("label", "Column of the label.")
    quoting: bool = setting(True, "In .csv and .tsv, double quotes enclose fields; false where they are literal.")
    max_length: int | None = setting(
        None,
        "Longer inputs are cut, the longer text first; of squad, contexts into windows. Default: 128, of squad 384.",
        unit="tokens",
        ge=8,
    )
    max_train: int | None = setting(None, "Use at most this many training examples, drawn by seed.", unit="examples", ge=1)
    dev_fraction: float = setting(0.1, "Share of train held out when there is no dev split.", gt=0, lt=1)
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman"] | None = setting(
        None, "Score to report first; default: accuracy, or spearman for regression; glue and squad have their own."
    )

    @property
    def length(self) -> int:
        """Tokens of an input at most."""
        return self.max_length or (384 if self.squad else 128)

    @model_validator(mode="after")
    def _one_source(self) -> TaskSettings:
        if self.embedded + sum(source is not None for source in (self.train, self.glue, self.squad)) != 1:
            raise ValueError(
                "give one of embedded: true, train: FILE, glue: NAME with directory: DIR, or squad: {train: FILE, dev: FILE}; and embedded: false"
                " where a recipe this one extends has it"
            )
        if (self.glue is None) != (self.directory is None):
            raise ValueError(f"glue: {self.glue or 'NAME'} and directory: {self.directory or 'DIR'} belong together; give both")
        if self.train is None and (self.dev or self.test):
            raise ValueError("dev and test are tables beside train; leave them out where the task is embedded, glue or squad")
        if self.glue or self.squad:
            self._check_own()
        elif self.metric in ("pearson", "spearman") and self.kind == "classification":
            raise ValueError(f"metric {self.metric} needs kind: regression")
        elif self.metric in ("accuracy", "f1", "matthews") and self.kind == "regression":
            raise ValueError(f"metric {self.metric} needs kind: classification")
        return self

    def _check_own(self) -> None:
        """GLUE and SQuAD come with what a table must be told."""
        own = ("kind", "text", "text_pair", "label", "quoting", "metric")
        given = [name for name in own if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(f"{'glue' if self.glue else 'squad'} comes with its own {', '.join(own)}; leave out {', '.join(given)}")
        if self.squad and self.squad.doc_stride >= (room := self.length - MAX_QUESTION - AROUND):
            raise ValueError(
                f"squad.doc_stride {self.squad.doc_stride} is not below the {max(room, 0)} tokens that a window of max_length {self.length} has for"
                f" the context beside a question of {MAX_QUESTION}; raise max_length (384 is usual) or lower doc_stride"
            )
