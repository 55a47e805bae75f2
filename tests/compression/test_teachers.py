from types import SimpleNamespace

import pytest

from pipeline.compression import teachers
from pipeline.errors import UserError


def model(labels=("no", "yes"), vocabulary=50, width=32, heads=(4, 4)):
    names = dict(enumerate(labels))
    config = {"id2label": names, "num_labels": len(names), "vocab_size": vocabulary, "hidden_size": width, "heads_per_layer": list(heads)}
    return SimpleNamespace(config=SimpleNamespace(name_or_path="DIR", **config))


@pytest.mark.parametrize(
    ("teacher", "labels", "message"),
    [
        ({"labels": ("yes", "no")}, ("no", "yes"), "its labels are yes, no, the task's no, yes, in this order"),
        ({"labels": ("no", "yes", "perhaps")}, ("no", "yes"), "its labels are no, yes, perhaps, the task's no, yes"),
        ({}, (), "its labels are no, yes, the task's a number"),
        ({"vocabulary": 60}, ("no", "yes"), "it knows 60 tokens, the student 50"),
        ({"width": 64}, ("no", "yes"), "its hidden states have 64 dimensions, the student's 32; set distillation.layers: 0"),
        ({"width": 64}, None, "its hidden states have 64 dimensions"),
        ({"heads": (4, 4, 4)}, None, r"its layers have \[4, 4, 4\] heads, the student's before pruning \[4, 4\]; set distillation.attention: 0"),
    ],
)
def test_a_teacher_that_cannot_be_learnt_from_is_told(teacher, labels, message):
    with pytest.raises(UserError, match=f"DIR: the student cannot learn from this teacher: {message}"):
        teachers.check(model(**teacher), model(), labels, layers=True, heads=True)


@pytest.mark.parametrize(
    ("teacher", "labels", "layers"),
    [({}, ("no", "yes"), True), ({"width": 64}, ("no", "yes"), False), ({"labels": ("LABEL_0",)}, (), True), ({"labels": ("a",)}, None, True)],
)
def test_one_that_can_is_taken(teacher, labels, layers):
    """A regression's only label has no name that matters, answers that are spans have none; outputs alone may come from any width."""
    teachers.check(model(**teacher), model(), labels, layers=layers, heads=layers)
