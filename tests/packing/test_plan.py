from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.packing.plan import Plan, make
from pipeline.packing.settings import PackSettings


@pytest.fixture
def plan(tmp_path, make_store, make_tokenizer):
    return make(tmp_path / "plan", PackSettings(length=10), "encoder", make_store([20, 13, 7]), make_tokenizer())


def test_a_plan_is_read_as_it_was_written(plan):
    read = Plan.open(plan.directory)
    assert read.fingerprint == plan.fingerprint
    assert (read.length, read.tokens_per_row, read.kind, read.settings) == (10, 8, "encoder", PackSettings(length=10))
    assert read.groups.tolist() == [[0], [1], [2], [3], [4]]


def test_a_plan_accounts_for_every_token(tmp_path, make_store, make_tokenizer):
    settings = PackSettings(length=10, segments="within", min_tokens=6, groups="consecutive", group_size=2)
    plan = make(tmp_path / "plan", settings, "decoder", make_store([20, 13, 7]), make_tokenizer())
    # 20 = 10 + 10, 13 = 10 + 3 dropped, 7; the last two are alone in groups of two
    expected = {"tokens": 37, "dropped_tokens": 3, "padded_tokens": 23, "fill_rate": 37 / 60}
    assert {key: plan.description[key] for key in expected} == expected


def test_an_epochs_order_is_a_permutation_of_its_seed_and_number(plan):
    order = plan.order(seed=3, epoch=1)
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert (order == Plan.open(plan.directory).order(3, 1)).all()
    others = {tuple(plan.order(seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(others) > 10


def test_another_tokenizer_is_refused(plan, make_store, make_tokenizer):
    plan.check(make_store([20, 13, 7]), make_tokenizer())
    with pytest.raises(UserError, match=r"plan\.json: the plan was made with tokenizer [0-9a-f]{8}, this is tokenizer [0-9a-f]{8}"):
        plan.check(make_store([20, 13, 7]), make_tokenizer(mask=5))


def test_another_token_store_is_refused(plan, make_store, make_tokenizer):
    with pytest.raises(UserError, match=r"token store [0-9a-f]{8}, this is token store"):
        plan.check(make_store([20, 13, 8]), make_tokenizer())


def test_an_encoder_needs_the_tokens_its_rows_begin_and_end_with(tmp_path, make_store, make_tokenizer):
    with pytest.raises(UserError, match="no cls and no sep token"):
        make(tmp_path / "plan", PackSettings(), "encoder", make_store([20]), make_tokenizer(cls=None, sep=None))
    make(tmp_path / "plan", PackSettings(), "decoder", make_store([20]), make_tokenizer(cls=None, sep=None))


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def empty(path):
    path.write_bytes(b"")


class Code:
    def __reduce__(self):
        return (exit, ("the pickle was run",))


def pickled(path):
    path.write_bytes(pickle.dumps(Code()))


def of_objects(path):
    np.save(path, np.array([Code()], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [cut, empty, pickled, of_objects, lambda path: path.unlink(), lambda path: np.save(path, np.zeros((2, 2)))])
@pytest.mark.parametrize("name", ["pieces.npy", "segments.npy", "groups.npy"])
def test_a_damaged_array_is_refused_by_name(plan, name, damage):
    damage(plan.directory / name)
    with pytest.raises(UserError, match=rf"{name}: .*run pack again"):
        Plan.open(plan.directory)


@pytest.mark.parametrize("change", [{"format": 2}, {"settings": {"length": 1}}, {"kind": "both"}, {"arrays": {}}, {"arrays": []}])
def test_a_damaged_description_is_refused(plan, change):
    file = plan.directory / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"plan\.json: .*run pack again"):
        Plan.open(plan.directory)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_file_that_is_no_plan_is_refused(plan, text):
    (plan.directory / "plan.json").write_text(text)
    with pytest.raises(UserError, match="not a readable plan"):
        Plan.open(plan.directory)
