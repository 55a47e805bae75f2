"""What is built depends on documents, model and settings alone: not on ranks, nor on how often it was cut off."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.memory import building, description, documents, quantiser, shards
from pipeline.memory.datastore import Datastore
from tests.memory.stores import Made, contents

IVF = {"kind": "ivfpq", "lists": 8, "shard_keys": 120}


def test_entries_are_keys_and_values_of_every_place_of_every_document(tmp_path):
    made = Made(tmp_path, shard_keys=120)
    keys, values = made.entries()
    about = description.read(made.directory)
    opened = shards.Shards.open(made.directory, about)
    assert np.concatenate(opened.values).tolist() == values.tolist()
    np.testing.assert_allclose(np.concatenate(opened.keys).astype(float), keys.astype(float), atol=4e-3)
    assert max(about["shards"]) <= 120
    table = list(documents.table(made.directory / "documents.jsonl"))
    assert [entry.count for entry in table] == (made.store.lengths - 1).tolist()
    assert [entry.first for entry in table] == np.append(0, np.cumsum(made.store.lengths - 1))[:-1].tolist()
    assert table[3].preview == made.tokenizer.decode(made.store.read(3)[:-1])[: documents.PREVIEW].strip()
    assert table[3].key == "train document 3"


@pytest.mark.parametrize("settings", [IVF, {**IVF, "keep_keys": False}, {"shard_keys": 120}])
def test_two_ranks_make_what_one_makes(tmp_path, monkeypatch, settings):
    """The ranks take turns, as far as each gets without the others; what a barrier waits for is made in a later turn."""
    one = contents(Made(tmp_path / "one", **settings).directory)

    class Waits(Exception):
        pass

    class Rank(Ranks):
        def barrier(self):
            if not all(description.shard(both.directory, number).is_dir() for number in range(len(building.cut(entries, 120)))):
                raise Waits

    both = Made(tmp_path / "two", ranks=(), **settings)
    entries = both.store.lengths - 1
    for rank in (1, 0):
        try:
            both.build(Rank(rank, 2))
        except Waits:
            assert rank == 1
    both.build(Rank(1, 2))  # its shards have keys by now; here it makes their lists
    both.build(Rank(0, 2))
    assert contents(both.directory) == one


@pytest.mark.parametrize("settings", [IVF, {**IVF, "keep_keys": False, "bits": 4}])
def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch, settings):
    whole = contents(Made(tmp_path / "whole", **settings).directory)
    made = Made(tmp_path / "killed", ranks=(), **settings)
    left, rewritten = 0, []

    def stopping(function):
        def call(*arguments, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            rewritten.append(arguments[0])
            return function(*arguments, **named)

        return call

    for room, name in ((shards, "write"), (quantiser, "train"), (quantiser, "write_part"), (documents, "write"), (description, "write")):
        monkeypatch.setattr(room, name, stopping(getattr(room, name)))
    for _attempt in range(100):
        left = 1
        try:
            made.build()
            break
        except KeyboardInterrupt:
            continue
    assert contents(made.directory) == whole
    assert len(rewritten) == len({str(path) for path in rewritten}) + 1  # the directory itself: once for the quantiser, once for the description


def test_a_cap_takes_whole_documents_from_all_over(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 60, size=1000)
    chosen = building.choose(lengths, 5000)
    entries = (lengths - 1)[chosen].sum()
    assert 4800 < entries <= 5000
    assert np.abs(np.diff(chosen)).max() < 20
    assert building.choose(lengths, None).tolist() == np.flatnonzero(lengths > 1).tolist()
    with pytest.raises(UserError, match=r"index\.max_keys 3"):
        building.choose(np.array([10, 10]), 3)


def test_auto_is_flat_for_few_keys_and_lists_for_many(tmp_path, monkeypatch):
    assert Datastore.open(Made(tmp_path / "few").directory).kind == "flat"
    monkeypatch.setattr(building, "FLAT", 500)
    assert Datastore.open(Made(tmp_path / "many").directory).kind == "ivfpq"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduce": 17}, "exceeds the 16 dimensions"),
        ({"subquantizers": 5}, "not a divisor of the 16"),
        ({"max_keys": 100, "bits": 8}, "too few to train"),
    ],
)
def test_settings_that_do_not_suit_the_keys(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        Made(tmp_path, **{"kind": "ivfpq", **settings})
