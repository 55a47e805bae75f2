from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from pydantic import ValidationError

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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"groups": "bm25"}, "groups: bm25 needs group_size of 2 or more"),
        ({"groups": "consecutive", "segments": "within"}, "groups: consecutive needs group_size of 2 or more"),
        ({"groups": "consecutive", "group_size": 4}, "set segments: within, or mix_documents: true"),
        ({"groups": "consecutive", "group_size": 4, "segments": "best_fit", "mix_documents": True}, "leaves no order"),
        ({"mix_documents": True}, "mix_documents is about groups: consecutive only"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        PackSettings(**given)


def test_consecutive_groups_may_run_over_documents_when_asked(make_store, make_tokenizer, tmp_path):
    settings = PackSettings(length=10, segments="across", groups="consecutive", group_size=3, mix_documents=True)
    plan = make(tmp_path / "plan", settings, "decoder", make_store([25, 3, 0, 41]), make_tokenizer())
    assert plan.groups.tolist() == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]


def test_random_groups_depend_on_the_seed_alone(make_store, make_tokenizer, tmp_path):
    settings, store = PackSettings(length=10, group_size=3), make_store([100, 30])
    made = [make(tmp_path / str(number), settings, "decoder", store, make_tokenizer(), seed=seed) for number, seed in enumerate((1, 1, 2))]
    one, same, other = (plan.groups for plan in made)
    assert one.tolist() == same.tolist() != other.tolist()
    assert sorted(one[one >= 0]) == list(range(13))


def test_best_fit_rows_reach_the_plan_with_their_padding_told(make_store, make_tokenizer, tmp_path):
    plan = make(tmp_path / "plan", PackSettings(length=10, segments="best_fit"), "decoder", make_store([7, 3, 12, 4]), make_tokenizer())
    assert len(plan.groups) == 3  # 10 of 12; 7 + 3; 4 + 2
    assert {name: plan.description[name] for name in ("tokens", "dropped_tokens", "padded_tokens")} == {
        "tokens": 26,
        "dropped_tokens": 0,
        "padded_tokens": 4,
    }
