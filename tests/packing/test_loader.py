from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.corpus.store import Store, Writer
from pipeline.errors import UserError
from pipeline.packing.loader import Loader
from pipeline.packing.plan import make
from pipeline.packing.settings import PackSettings

LENGTHS = [25, 3, 0, 41, 17, 60, 9]
ACROSS = PackSettings(length=10)
PAIRS = PackSettings(length=10, segments="within", min_tokens=2, groups="consecutive", group_size=2)


@pytest.fixture(scope="session")
def loader(make_store, make_tokenizer, tmp_path_factory):
    @lru_cache
    def build(settings=ACROSS, batch_size=8, seed=5, kind="encoder", lengths=tuple(LENGTHS), **options):
        store = make_store(lengths)
        plan = make(tmp_path_factory.mktemp("plan"), settings, kind, store, make_tokenizer())
        return Loader(plan, store, make_tokenizer(), batch_size, seed, **options)

    return build


def test_an_encoders_rows_are_cls_tokens_sep_padding(loader):
    rows = loader(PAIRS).rows(np.array([3, 4, 2, -1]))
    # rows of 8: document 0 has segments 0 to 2 (a tail of 1 is dropped), document 1 has 3, document 3 begins with 4
    assert rows["input_ids"].tolist() == [
        [2, 110, 111, 112, 3, 0, 0, 0, 0, 0],
        [2, *range(310, 318), 3],
        [2, *range(26, 34), 3],
        [2, 3, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert rows["attention_mask"].sum(1).tolist() == [5, 10, 10, 2]
    assert all(values.dtype == np.int64 for values in rows.values())


def test_a_decoders_rows_are_tokens_alone_and_run_over_document_ends(loader):
    rows = loader(kind="decoder").rows(np.array([2, 15, -1]))
    assert rows["input_ids"].tolist() == [[*range(30, 35), *range(110, 113), 310, 311], [*range(614, 619), 0, 0, 0, 0, 0], [0] * 10]
    assert rows["attention_mask"].tolist() == [[1] * 10, [1] * 5 + [0] * 5, [1] + [0] * 9]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("settings", [ACROSS, PAIRS])
def test_every_row_is_the_stores_tokens_of_its_pieces(loader, settings, kind):
    whole = loader(settings, kind=kind)
    plan = whole.plan
    segments = np.arange(len(plan.segments) - 1)[::-1]
    rows = whole.rows(segments)
    for row, segment in enumerate(segments):
        pieces = plan.pieces[plan.segments[segment] : plan.segments[segment + 1]]
        tokens = [token for piece in pieces for token in whole.store.read(*piece)]
        filled = [2, *tokens, 3] if kind == "encoder" else tokens
        assert rows["input_ids"][row].tolist() == filled + [0] * (10 - len(filled))
        assert rows["attention_mask"][row].tolist() == [1] * len(filled) + [0] * (10 - len(filled))


def test_tokens_beyond_16_bits_arrive(tmp_path, make_tokenizer):
    with Writer(tmp_path / "00000", np.int32) as writer:
        writer.add([70000, 2**31 - 1, 5])
    store = Store.open(tmp_path)
    plan = make(tmp_path / "plan", ACROSS, "decoder", store, make_tokenizer())
    assert Loader(plan, store, make_tokenizer(), 1, 0).batch(0)["input_ids"].tolist() == [[70000, 2**31 - 1, 5] + [0] * 7]


def test_document_ids_number_the_documents_of_a_row(loader):
    rows = loader(document_mask=True).rows(np.array([2, 3, -1]))
    # rows of 8: row 2 ends document 0, row 3 has its last token, the 3 of document 1 (document 2 is empty) and the first 4 of document 3
    assert rows["document_ids"].tolist() == [[0] * 10, [0, 0, 1, 1, 1, 2, 2, 2, 2, 2], [0, 0] + [-1] * 8]
    assert rows["document_ids"].dtype == np.int64
    rows = loader(kind="decoder", document_mask=True).rows(np.array([2, 15, -1]))
    assert rows["document_ids"].tolist() == [[0] * 5 + [1] * 3 + [2] * 2, [0] * 5 + [-1] * 5, [0] + [-1] * 9]


def test_two_pieces_of_one_document_count_as_two(loader, make_tokenizer):
    plain = loader(PAIRS)
    pieces, segments = np.array([[3, 0, 2], [3, 20, 3], [0, 1, 1]]), np.array([0, 3])
    plan = replace(plain.plan, pieces=pieces, segments=segments, groups=np.array([[0, -1]]))
    rows = Loader(plan, plain.store, make_tokenizer(), 2, 0, document_mask=True).batch(0)
    assert rows["input_ids"][0].tolist() == [2, 310, 311, 330, 331, 332, 11, 3, 0, 0]
    assert rows["document_ids"][0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, -1, -1]


def test_the_document_mask_changes_nothing_else(loader):
    plain, masked = loader(PAIRS).batch(3), loader(PAIRS, document_mask=True).batch(3)
    assert set(masked) - set(plain) == {"document_ids"}
    assert all((masked[name] == plain[name]).all() for name in plain)
    assert ((masked["document_ids"] >= 0) == (masked["attention_mask"] == 1)).all()


def test_places_say_where_in_its_document_each_token_stands(loader, make_tokenizer):
    plain, placed = loader(PAIRS, kind="decoder"), loader(PAIRS, kind="decoder", places=True)
    rows = placed.rows(np.array([1, 3, -1]))
    # rows of 10: document 0 has segments 0 to 2, document 1 has 3
    assert rows["document"].tolist() == [[0] * 10, [1] * 3 + [-1] * 7, [-1] * 10]
    assert rows["offset"].tolist() == [list(range(10, 20)), [0, 1, 2] + [-1] * 7, [-1] * 10]
    assert set(placed.batch(0)) - set(plain.batch(0)) == {"document", "offset"}
    rows = loader(document_mask=True, places=True).rows(np.array([3]))  # an encoder's: [cls], the last token of 0, 3 of 1, 4 of 3, [sep]
    assert rows["document"].tolist() == [[-1, 0, 1, 1, 1, 3, 3, 3, 3, -1]]
    assert rows["offset"].tolist() == [[-1, 24, 0, 1, 2, 0, 1, 2, 3, -1]]
    assert rows["document_ids"].tolist() == [[0, 0, 1, 1, 1, 2, 2, 2, 2, 2]]


def test_words_and_notes_are_added_and_change_nothing_else(trained, store_of, tmp_path):
    tokenizer = trained["unigram"]
    store = store_of([[*tokenizer(text, add_special_tokens=False)["input_ids"], 3] for text in ("a long text and a word", "the word comes next")])
    plan = make(tmp_path, ACROSS, "encoder", store, tokenizer)
    plain, words, noted, other = (
        Loader(plan, store, tokenizer, 3, 5, **options)
        for options in ({}, {"words": True}, {"rare": np.array([7], np.uint64)}, {"rare": np.array([8], np.uint64)})
    )
    rows = noted.batch(1)
    assert set(words.batch(1)) - set(plain.batch(1)) == {"word"}
    assert set(rows) - set(words.batch(1)) == {"note", "occurrences"}
    assert all((rows[name] == values).all() for name, values in words.batch(1).items())
    assert all((rows[name] == values).all() for name, values in plain.batch(1).items())
    assert (rows["word"] >= 0).sum() == ((rows["attention_mask"] == 1) & (rows["input_ids"] >= 5)).sum()
    assert plain.fingerprint == words.fingerprint, "rows are the same"
    assert len({each.fingerprint for each in (plain, noted, other)}) == 3, "a note's number means a word"


QUADS = PackSettings(length=10, segments="within", min_tokens=2, groups="consecutive", group_size=4)


@pytest.mark.parametrize(("together", "world"), [(2, 2), (4, 4), (2, 4)])
def test_ranks_that_share_groups_hold_consecutive_parts_of_the_same_groups(loader, together, world):
    whole, shared = loader(QUADS).batch(1), loader(QUADS, ranks_per_group=together)
    assert shared.unit == 4 // together
    parts = [shared.batch(1, rank, world) for rank in range(world)]
    teams = [parts[first : first + together] for first in range(0, world, together)]
    for team in teams:
        assert all((part["group"] == team[0]["group"]).all() for part in team)
    groups = [np.concatenate([part["segment"].reshape(-1, shared.unit) for part in team], axis=1) for team in teams]
    assert np.concatenate(groups).reshape(-1).tolist() == whole["segment"].tolist()


def test_ranks_that_share_too_few_groups_are_refused(loader):
    with pytest.raises(UserError, match="6 ranks share 2 groups in a batch: every 2 need one; use at most 4 ranks"):
        loader(QUADS, ranks_per_group=2).batch(0, 0, 6)


@hypothesis_settings(deadline=None)  # the first call compiles
@given(step=st.integers(0, 40), world=st.integers(1, 4), settings=st.sampled_from([ACROSS, PAIRS]))
def test_the_ranks_together_see_the_plans_order_whatever_their_number(loader, step, world, settings):
    whole = loader(settings)
    count = len(whole.plan.groups)
    groups = whole.groups_per_batch
    expected = [whole.plan.groups[whole.plan.order(5, p // count)[p % count]] for p in range(step * groups, (step + 1) * groups)]
    parts = [loader(settings).batch(step, rank, world) for rank in range(world)]
    assert np.concatenate([part["segment"] for part in parts]).tolist() == np.concatenate(expected).tolist()
    for key in ("input_ids", "attention_mask", "segment"):
        assert (np.concatenate([part[key] for part in parts]) == whole.batch(step)[key]).all()


@hypothesis_settings(deadline=None)  # the first call compiles
@given(step=st.integers(0, 20), world=st.integers(1, 4))
def test_groups_stay_whole_on_one_rank_and_are_numbered_from_0(loader, step, world):
    for rank in range(world):
        part = loader(PAIRS).batch(step, rank, world)
        assert part["group"].tolist() == [number for number in range(len(part["group"]) // 2) for _ in range(2)]


def test_an_epoch_shows_every_segment_once(loader):
    whole = loader(batch_size=4)
    assert whole.steps_per_epoch == 5.0
    seen = np.concatenate([whole.batch(step)["segment"] for step in range(5, 10)])
    assert sorted(seen) == list(range(20))


def test_any_step_can_be_asked_for_in_any_order(loader, make_store, make_tokenizer):
    used = loader()
    for step in (0, 9, 2, 1):
        used.batch(step)
    fresh = Loader(used.plan, used.store, make_tokenizer(), 8, 5)
    assert (fresh.batch(7)["input_ids"] == used.batch(7)["input_ids"]).all()


def test_the_fingerprint_tells_plan_batch_size_seed_and_document_mask(loader):
    loaders = [loader(), loader(seed=6), loader(batch_size=4), loader(PAIRS), loader(document_mask=True)]
    assert len({each.fingerprint for each in loaders}) == 5


def test_more_ranks_than_groups_in_a_batch_are_refused(loader):
    assert len(loader(PAIRS).batch(0, 3, 4)["segment"]) == 2
    with pytest.raises(UserError, match="5 ranks share 4 groups in a batch"):
        loader(PAIRS).batch(0, 0, 5)


def test_more_ranks_than_segments_are_refused(loader):
    with pytest.raises(UserError, match="3 ranks share 2 segments in the plan"):
        loader(lengths=(12,)).batch(0, 0, 3)


def test_an_empty_plan_is_refused(loader):
    with pytest.raises(UserError, match="the plan has no segments"):
        loader(lengths=(0,))


def test_a_batch_of_broken_groups_is_refused(loader):
    with pytest.raises(UserError, match="batch_size 3 is not a multiple of the plan's group size 2"):
        loader(PAIRS, batch_size=3)


def test_a_plan_of_another_tokenizer_is_refused(loader, make_tokenizer):
    with pytest.raises(UserError, match="made with tokenizer"):
        Loader(loader().plan, loader().store, make_tokenizer(sep=9), 8, 5)


@pytest.mark.parametrize(
    "damage",
    [
        {"pieces": np.array([[9, 0, 4]])},
        {"pieces": np.array([[-1, 0, 4]])},
        {"pieces": np.array([[1, -1, 2]])},
        {"pieces": np.array([[1, 1, 3]])},
        {"pieces": np.array([[0, 2**62, 2**62]])},
        {"pieces": np.array([[0, 0, 9]])},
        {"segments": np.array([0, 2])},
        {"segments": np.array([-1, 1])},
        {"groups": np.array([[1]])},
    ],
)
def test_a_plan_that_points_beyond_the_store_is_refused(loader, make_tokenizer, damage):
    whole = {"pieces": np.array([[0, 0, 4]]), "segments": np.array([0, 1]), "groups": np.array([[0]])}
    plan = replace(loader().plan, **whole)
    assert Loader(plan, loader().store, make_tokenizer(), 1, 0).batch(0)["attention_mask"].sum() == 6
    with pytest.raises(UserError, match=r"pieces\.npy: segment [01] .* run pack again"):
        Loader(replace(plan, **damage), loader().store, make_tokenizer(), 1, 0)
