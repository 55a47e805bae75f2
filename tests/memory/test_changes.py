"""Documents come and go without a trace, whole, and whenever it is cut off."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pipeline import artifacts
from pipeline.corpus.settings import Source
from pipeline.errors import UserError
from pipeline.memory import changes, description, documents, quantiser
from pipeline.memory.datastore import Datastore
from pipeline.memory.shards import Shards
from tests.memory.stores import Made, contents, decoder

KINDS = [{"shard_keys": 120}, {"kind": "ivfpq", "lists": 8, "shard_keys": 120}]
KINDS.append({**KINDS[1], "keep_keys": False, "bits": 4})


def text_of(made, path, documents_of=range(5, 9)):
    """A corpus file of the first few words of the vocabulary: a document a paragraph."""
    path.write_text("\n\n".join(" ".join(f"w{5 + (number * word) % 50}" for word in range(1, 12)) for number in documents_of))
    return Source(path=str(path))


def keys_of(made, number):
    """The keys that a search for that document would use, and its line in the table."""
    entry = next(entry for entry in documents.table(made.directory / "documents.jsonl") if entry.number == number)
    return torch.from_numpy(made.entries([number])[0].astype(np.float32)), entry


@pytest.mark.parametrize("settings", KINDS)
def test_a_removed_document_cannot_be_found_and_its_bytes_are_gone(tmp_path, settings):
    made = Made(tmp_path, metric="l2", **settings)
    queries, entry = keys_of(made, 7)
    before = Datastore.open(made.directory)
    kept = [shard.copy() for shard in Shards.open(made.directory, before.description).keys]
    stored = np.concatenate(kept)[entry.first : entry.first + entry.count] if kept else np.empty((0, 16), np.float16)
    everything = len(before)
    found = before.search(queries, everything)[0]
    traces = [row.tobytes() for row in stored] + [entry.preview.encode(), entry.sha256.encode()]
    assert all(any(trace in content for content in contents(made.directory).values()) for trace in traces)

    assert [gone.number for gone in changes.remove(made.directory, [7])] == [7]
    after = Datastore.open(made.directory)
    assert len(after) == everything - entry.count
    assert after.revision != before.revision
    scores, remaining = after.search(queries, everything)
    assert (torch.isfinite(scores).sum(dim=1) == len(after)).all()
    others = np.concatenate([made.entries([number])[1] for number in range(40) if number != 7])
    assert sorted(remaining[0][remaining[0] >= 0].tolist()) == sorted(others.tolist())
    if kept:
        assert (scores[:, 0] < found[:, 0] - 1e-6).all()  # nothing is as near as a key to itself
    assert not [trace for trace in traces for content in contents(made.directory).values() if trace in content]
    for part in made.directory.glob("shards/*/part.faiss"):
        ids = all_ids(quantiser._read(part))
        assert not ids & set(range(entry.first, entry.first + entry.count))
    again = before.search(queries, everything)[1]  # opened before the removal
    assert sorted(again[0][again[0] >= 0].tolist()) == sorted(others.tolist())


def all_ids(index):
    import faiss

    lists = index.invlists
    return {int(entry) for number in range(index.nlist) for entry in faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number))}


@pytest.mark.parametrize("settings", KINDS)
def test_an_added_document_is_found_and_can_be_withdrawn_by_its_text(tmp_path, settings):
    made = Made(tmp_path, **settings)
    before = Datastore.open(made.directory)
    added = changes.add(made.directory, [text_of(made, tmp_path / "more.txt")])
    assert [entry.number for entry in added] == [40, 41, 42, 43]
    after = Datastore.open(made.directory)
    assert len(after) == len(before) + sum(entry.count for entry in added)
    assert added[0].preview == " ".join(f"w{5 + (5 * word) % 50}" for word in range(1, 12))
    assert "more.txt, document 1" in added[0].key
    values = after.search(torch.ones(1, 16), len(after))[1]
    tokens = [token for entry in made.entries()[1:] for token in entry]
    for number in range(5, 9):
        tokens += [*(5 + (number * word) % 50 for word in range(2, 12)), 3]
    assert sorted(values[0].tolist()) == sorted(tokens)
    assert not (made.directory / changes.ADDING).exists()

    assert changes.add(made.directory, [text_of(made, tmp_path / "more.txt")]) == []  # they are there already
    (tmp_path / "one.txt").write_text(added[2].preview + "\n")
    assert [entry.number for entry in changes.remove(made.directory, texts=[tmp_path / "one.txt"])] == [42]
    assert added[2].preview not in (made.directory / "documents.jsonl").read_text()
    assert len(Datastore.open(made.directory)) == len(after) - added[2].count
    assert changes.add(made.directory, [text_of(made, tmp_path / "again.txt", [7])])[0].number == 44


STEPS = [
    (changes.os, "rename"), (Shards, "erase"), (quantiser, "remove"), (documents, "write"), (description, "write"), (artifacts, "revise"),
    (changes, "_apply"), (artifacts, "sync"), (changes.shutil, "rmtree"),
]  # fmt: skip


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_change_that_is_cut_off_anywhere_never_was_or_is_completed(tmp_path, monkeypatch, change):
    settings = KINDS[1]

    def act(made):
        if change == "add":
            changes.add(made.directory, [text_of(made, tmp_path / "more.txt")])
        else:
            changes.remove(made.directory, [0, 7, 39])

    whole = Made(tmp_path / "whole", **settings)
    as_artifact(whole.directory)
    start = contents(whole.directory)
    act(whole)
    end = contents(whole.directory)
    outcomes = set()
    for cut in range(200):
        made = Made(tmp_path / f"cut{cut}", **settings)
        as_artifact(made.directory)
        calls = itertools.count()
        with monkeypatch.context() as patch:
            for room, name in STEPS:
                patch.setattr(room, name, stopping(getattr(room, name), calls, cut))
            try:
                act(made)
                break
            except KeyboardInterrupt:
                pass
        opened = Datastore.open(made.directory)
        artifacts.Artifact.open(made.directory.parent, check_contents=True)
        found = {name: content for name, content in contents(made.directory).items() if not name.startswith("adding/")}
        outcome = found == start, found == end
        assert True in outcome
        outcomes.add(outcome)
        assert len(opened) > 0
        if outcome[0]:
            act(made)  # nothing is in the way of another attempt
            assert contents(made.directory) == end
    assert outcomes == {(True, False), (False, True)}
    assert cut > 8


def stopping(function, calls, cut):
    def call(*arguments, **named):
        if next(calls) >= cut:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    return call


def as_artifact(datastore):
    manifest = {"fingerprint": "0" * 64, "metrics": {}, "settings": {}, "inputs": {}, "files": {}}
    artifacts.write_json(datastore.parent / "manifest.json", manifest)
    about = description.read(datastore)
    artifacts.revise(datastore.parent, datastore.name, {**about["files"], description.NAME: None})


def test_mistakes_are_told_and_change_nothing(tmp_path):
    made = Made(tmp_path)
    before = contents(made.directory)
    with pytest.raises(UserError, match="no document of number 99"):
        changes.remove(made.directory, [3, 99])
    (tmp_path / "text.txt").write_text("w5 w6")
    with pytest.raises(UserError, match=r"no document of the text of .*text.txt"):
        changes.remove(made.directory, texts=[tmp_path / "text.txt"])
    decoder(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="give that model with --model"):
        changes.add(made.directory, [text_of(made, tmp_path / "more.txt")], model=tmp_path / "other")
    with pytest.raises(UserError, match="no such file"):
        changes.add(made.directory, [Source(path=str(tmp_path / "nothing.txt"))])
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="say where it is with --model"):
        changes.add(made.directory, [text_of(made, tmp_path / "more.txt")])
    assert contents(made.directory) == before
    assert len(changes.add(made.directory, [text_of(made, tmp_path / "more.txt")], model=tmp_path / "moved")) == 4


def test_two_changes_at_a_time_are_refused(tmp_path):
    made = Made(tmp_path)
    with changes._alone(made.directory), pytest.raises(UserError, match="another process is changing"):
        changes.remove(made.directory, [1])
