from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.recipe import Recipe
from pipeline.tasks.settings import TaskSettings

GLUE = {"glue": "RTE", "directory": "data"}
SQUAD = {"squad": {"train": "a.json", "dev": "b.json"}}


def test_inputs_are_as_long_as_is_usual_for_the_task():
    assert [TaskSettings(**task).length for task in (GLUE, SQUAD, {**SQUAD, "max_length": 256})] == [128, 384, 256]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({}, "give one of embedded: true, train: FILE, glue: NAME with directory: DIR, or squad:"),
        ({"train": "a.tsv", **GLUE}, "give one of"),
        ({"embedded": True, **SQUAD}, "give one of .* and embedded: false where a recipe this one extends has it"),
        ({**GLUE, **SQUAD}, "give one of"),
        ({"glue": "RTE"}, "glue: RTE and directory: DIR belong together"),
        ({"train": "a.tsv", "directory": "data"}, "glue: NAME and directory: data belong together"),
        ({"glue": "MRCP", "directory": "data"}, "Input should be 'CoLA', 'SST-2', 'MRPC'"),
        ({**GLUE, "dev": "dev.tsv"}, "dev and test are tables beside train"),
        ({**GLUE, "text": "sentence", "metric": "f1"}, "glue comes with its own .*; leave out text, metric"),
        ({**SQUAD, "kind": "regression"}, "squad comes with its own .*; leave out kind"),
        ({**SQUAD, "max_length": 128}, r"squad.doc_stride 128 is not below the 60 tokens .* raise max_length \(384 is usual\) or lower doc_stride"),
        ({"squad": {"train": "a.json"}}, "squad.dev\n  Field required"),
        ({"train": "a.tsv", "metric": "pearson"}, "metric pearson needs kind: regression"),
    ],
)
def test_a_task_that_does_not_fit_together_is_refused(task, message):
    with pytest.raises(ValidationError, match=message):
        TaskSettings(**task)


def test_a_model_that_is_too_short_for_a_task_is_told():
    made_here = {"name": "x", "tokenize": {"sources": ["embedded"]}, "pack": {}, "pretrain": {}, "model": {"max_length": 256}}
    with pytest.raises(ValidationError, match=r"finetune.task.max_length 384 exceeds model.max_length 256"):
        Recipe.model_validate({**made_here, "finetune": {"task": SQUAD}})
