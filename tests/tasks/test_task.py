from __future__ import annotations

import pytest

from pipeline.corpus import embedded
from pipeline.errors import UserError
from pipeline.tasks import task as tasks
from pipeline.tasks.settings import TaskSettings


@pytest.fixture
def table(tmp_path):
    def write(name, labels):
        path = tmp_path / name
        path.write_text("".join(f"{name} {number}\t{label}\n" for number, label in enumerate(labels)))
        return str(path)

    return write


def load(seed=1, **values):
    return tasks.load(TaskSettings(text=0, label=1, **values), seed)


def texts(task, split):
    return [example.text for example in task.splits[split]]


def test_labels_are_numbered_by_alphabet_or_by_size(table):
    assert load(train=table("a.tsv", ["b", "a", "10", "b"]), dev=table("d.tsv", ["a"])).labels == ("10", "a", "b")
    task = load(train=table("a.tsv", ["10", "9", "10"]), dev=table("d.tsv", ["9"]))
    assert task.labels == ("9", "10")
    assert [example.label for example in task.splits["train"]] == [1, 0, 1]


def test_a_regression_has_numbers_for_labels(table):
    task = load(train=table("a.tsv", ["3.5", "0"]), dev=table("d.tsv", ["7e-1"]), kind="regression")
    assert (task.regression, task.labels, task.metrics) == (True, (), ("spearman", "pearson"))
    assert [example.label for split in ("train", "dev") for example in task.splits[split]] == [3.5, 0.0, 0.7]


def test_a_missing_dev_split_is_drawn_from_train_by_seed(table):
    train = table("a.tsv", ["x", "y"] * 20)
    task = load(train=train)
    assert sorted(texts(task, "train") + texts(task, "dev")) == sorted(f"a.tsv {number}" for number in range(40))
    assert len(task.splits["dev"]) == 4
    assert task.remarks == ("no development split: 4 of 40 training examples are held out for it",)
    assert load(train=train).splits == task.splits
    assert texts(load(train=train, seed=2), "dev") != texts(task, "dev")


def test_the_test_split_is_dev_unless_given(table):
    train, dev = table("a.tsv", ["x", "y"]), table("d.tsv", ["x"])
    assert texts(load(train=train, dev=dev), "test") == ["d.tsv 0"]
    assert texts(load(train=train, dev=dev, test=table("t.tsv", ["y"])), "test") == ["t.tsv 0"]


def test_max_train_draws_from_train_alone(table):
    train = table("a.tsv", ["x", "y"] * 20)
    whole, some = load(train=train), load(train=train, max_train=10)
    assert len(some.splits["train"]) == 10
    assert set(texts(some, "train")) <= set(texts(whole, "train"))
    assert some.splits["dev"] == whole.splits["dev"]


def test_the_embedded_task_has_its_own_splits(monkeypatch):
    # Reading every installed module takes too long here; the corpus room tests that.
    splits = {"train": [("t", "numpy"), ("u", "torch")], "dev": [("d", "torch")], "test": [("e", "numpy")]}
    monkeypatch.setattr(embedded, "task_splits", lambda seed: splits)
    task = tasks.load(TaskSettings(embedded=True), seed=1)
    assert (task.labels, task.metrics) == (("numpy", "torch"), ("accuracy",))
    assert [(example.text, example.label) for split in ("dev", "test") for example in task.splits[split]] == [("d", 1), ("e", 0)]


def test_a_label_that_train_does_not_know_is_refused(table):
    with pytest.raises(UserError, match=r"d\.tsv:2: label 'z' is not among the task's \(x, y\)"):
        load(train=table("a.tsv", ["x", "y"]), dev=table("d.tsv", ["x", "z"]))


@pytest.mark.parametrize("label", ["high", "nan", "inf", ""])
def test_a_label_that_is_no_number_is_refused_in_a_regression(table, label):
    with pytest.raises(UserError, match=rf"a\.tsv:2: label '{label}' is not a number"):
        load(train=table("a.tsv", ["1", label]), dev=table("d.tsv", ["1"]), kind="regression")


def test_labels_that_are_all_the_same_are_refused(table):
    with pytest.raises(UserError, match=r"a\.tsv: every label is 'x'"):
        load(train=table("a.tsv", ["x", "x"]))


def test_too_few_examples_to_hold_some_out_are_refused(table):
    with pytest.raises(UserError, match=r"a\.tsv: 2 examples, too few to hold 0\.6 of them out; give a development split"):
        load(train=table("a.tsv", ["x", "y"]), dev_fraction=0.6)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_task_is_kept_as_it_was_used(table, tmp_path, kind):
    task = load(train=table("a.tsv", ["0", "1"] * 10), kind=kind)
    task.save(tmp_path / "task.json")
    assert tasks.open(tmp_path / "task.json") == task


@pytest.mark.parametrize("content", ['{"labels": []}', '{"kind": "labels", "labels": []}', '{"kind": "other"}', "{"])
def test_a_damaged_task_file_is_told(tmp_path, content):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(UserError, match="not a readable task"):
        tasks.open(tmp_path / "task.json")
