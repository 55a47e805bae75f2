from __future__ import annotations

from collections import Counter

import pytest

from pipeline.corpus import embedded
from pipeline.corpus.duplicates import Duplicates


@pytest.fixture(scope="module", autouse=True)
def _smaller_task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "TASK_EXAMPLES", {"test": 20, "dev": 20, "train": 60})
        yield


@pytest.fixture(scope="module")
def splits(_smaller_task):
    return embedded.task_splits(1)


@pytest.fixture(scope="module")
def networkx():
    return list(embedded.entries(["networkx"]))


def test_an_entry_is_a_module_a_class_or_a_function_with_its_header_and_docstring(tmp_path):
    (tmp_path / "m.py").write_text(
        '"""A module."""\nclass A(object):\n    """A class."""\n    def f(self,\n          x=1):\n        """A\n        method."""\n'
        "    def g(self): pass\n"
    )
    found = list(embedded.read_module("p", "p.m", tmp_path / "m.py"))
    assert [entry.document for entry in found] == [
        "p.m\nA module.",
        "p.m.A\nclass A(object):\nA class.",
        "p.m.A.f\ndef f(self, x=1):\nA\nmethod.",
    ]


def test_files_that_do_not_parse_are_passed_over(tmp_path):
    (tmp_path / "m.py").write_text('"""Not Python:"""\nprint {{ name }}\n')
    (tmp_path / "n.py").write_bytes(b'"""\xff"""')
    assert not list(embedded.read_module("p", "m", tmp_path / "m.py"))
    assert not list(embedded.read_module("p", "n", tmp_path / "n.py"))


def test_the_corpus_of_an_installation_is_the_same_every_time(networkx):
    assert list(embedded.entries(["networkx"])) == networkx
    assert len(networkx) > 1000
    assert sum(len(entry.document) for entry in networkx) > 1_000_000


def test_held_out_modules_come_first_and_their_docstrings_are_nowhere_else(tmp_path, monkeypatch):
    names = [f"p.m{number}" for number in range(200)]
    trained = [name for name in names if embedded.split_of(name) == "train"][:2]
    held_out = next(name for name in names if embedded.split_of(name) == "test")
    (tmp_path / "same.py").write_text('"""The same words."""')
    (tmp_path / "other.py").write_text('"""Other words."""')
    found = [(trained[0], tmp_path / "same.py"), (trained[1], tmp_path / "other.py"), (held_out, tmp_path / "same.py")]
    monkeypatch.setattr(embedded, "modules", lambda package: found)
    assert [entry.module for entry in embedded.entries(["p"])] == [held_out, trained[1]]


def test_a_package_that_is_not_installed_gives_nothing():
    assert embedded.modules("surely_not_installed") == []


def test_the_task_has_every_label_and_enough_examples(splits):
    for split, least in (("train", 60), ("dev", 10), ("test", 10)):
        count = Counter(label for _, label in splits[split])
        assert set(count) == set(embedded.TASK_PACKAGES)
        assert min(count.values()) >= least
        assert max(count.values()) <= embedded.TASK_EXAMPLES[split]


def test_the_seed_changes_the_order_of_the_task_and_not_its_examples(splits):
    other = embedded.task_splits(2)
    for split, examples in splits.items():
        assert other[split] != examples
        assert sorted(other[split]) == sorted(examples)


def test_no_example_is_like_one_of_another_split(splits):
    seen = Duplicates(0.8)
    assert all(seen.first_seen(text) for split in ("test", "dev", "train") for text, _ in splits[split])


def test_examples_of_dev_and_test_come_from_modules_that_are_never_trained_on(splits, networkx):
    trained = {entry.docstring for entry in networkx if embedded.split_of(entry.module) == "train"}
    held_out = {text for split in ("dev", "test") for text, label in splits[split] if label == "networkx"}
    assert len(held_out) == 40
    assert not held_out & trained
    assert {text for text, label in splits["train"] if label == "networkx"} <= trained
