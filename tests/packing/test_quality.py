from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pipeline import artifacts
from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.settings import Specification
from pipeline.corpus.store import Store, Writer
from pipeline.errors import UserError
from pipeline.packing import quality
from pipeline.packing.bm25.bags import Bags
from pipeline.packing.plan import make
from pipeline.packing.settings import PackSettings
from pipeline.packing.terms import Rows

PAIRS = {"segments": "within", "groups": "consecutive", "group_size": 2}


def rows(*lists):
    return Rows(np.array([term for row in lists for term in row], dtype=np.int32), np.cumsum([0, *map(len, lists)]))


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes") / "tokenizer"
    tokenizers.train(Specification(kind="bytes"), [], directory)
    return directory


@pytest.fixture
def packed(tmp_path, byte_tokenizer):
    """Makes a plan of texts, and gives it with its store and tokenizer."""
    tokenizer = tokenizers.load(byte_tokenizer)

    def make_plan(texts, **settings):
        (tmp_path / "store").mkdir()
        with Writer(tmp_path / "store" / "00000", np.uint16) as writer:
            for text in texts:
                writer.add([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        store = Store.open(tmp_path / "store")
        return make(tmp_path / "plan", PackSettings(**settings), "encoder", store, tokenizer), store, tokenizer

    return make_plan


def test_pair_scores_are_those_of_each_pair_and_none_where_there_is_no_pair():
    bags = Bags.of([np.array(row) for row in ([1, 2, 3], [1, 2, 4], [3, 4, 4], [5, 1, 1])])
    scores = quality.pair_scores(bags, np.array([[0, 1, 3], [2, -1, -1]]))
    assert np.isnan(scores[0]).tolist() == np.eye(3, dtype=bool).tolist()
    assert np.isnan(scores[1]).all()
    for i, query in enumerate([0, 1, 3]):
        for j, document in enumerate([0, 1, 3]):
            if i != j:
                assert scores[0, i, j] == bags.score(np.array([query]), np.array([[document]]))[0, 0]


def test_positives_are_targets_that_another_segment_of_the_group_has():
    # Targets are all tokens but a row's first. Group one: of 2, 3 | 4, 2, 2, row one has 2 from row two, and row two 2, 2 from row one.
    found, rare = quality.positives(rows([1, 2, 3], [9, 4, 2, 2], [3, 4]), np.array([[0, 1], [2, -1]]), np.full(10, 3))
    assert found == 3 / 6
    assert rare is None
    frequency = np.full(10, 3)
    frequency[[2, 3]] = 0
    assert quality.positives(rows([1, 2, 3], [9, 4, 2, 2], [3, 4]), np.array([[0, 1], [2, -1]]), frequency)[1] == 3 / 4


def test_document_frequency_counts_rows_not_tokens():
    assert quality.document_frequency(rows([1, 1, 3], [], [3, 1], [0])).tolist() == [1, 2, 0, 2]


def test_pairs_from_one_document_are_found_wherever_in_the_rows_it_stands(packed):
    plan, _, _ = packed(["a" * 11, "b" * 5, "c" * 2], length=10, groups="consecutive", group_size=3, mix_documents=True, segments="across")
    # 12 + 6 + 3 tokens in rows of 8: a | a, b | b, c
    assert quality.same_document(plan, np.array([[0, 1, 2]])) == 2 / 3
    assert quality.same_document(plan, np.array([[0, 2, -1]])) == 0
    assert quality.same_document(plan, np.array([[0, -1, -1]])) is None


def documents(count):
    """Texts of two segments, each about a word of its own."""
    words = (f"{'abcdefghij'[n % 10]}{n}word" for n in range(count))
    return [f"{word} {word} {word} said once" for word in words]


def test_groups_of_one_document_beat_a_random_plan_and_are_read_with_what_they_share(packed):
    plan, store, tokenizer = packed(documents(60), length=18, **PAIRS, min_tokens=4)
    found = quality.measure(plan, store, tokenizer, read=2)
    assert found.in_group.same_document == 1
    assert found.random.same_document < 0.2
    assert found.in_group.bm25 > 2 * found.random.bm25
    assert found.in_group.positives > found.random.positives
    assert found.measured == len(plan.groups)
    for number, members in found.read:
        group = plan.groups[number][plan.groups[number] >= 0]
        assert [member.segment for member in members] == group.tolist()
        assert {document for member in members for document in member.documents} == {plan.pieces[group[0], 0]}
        texts = [member.text.strip("…") for member in members]
        full = documents(60)[plan.pieces[group[0], 0]]
        assert all(text in full for text in texts)
        assert all(term in " ".join(texts) for member in members for term in member.shared)


def test_similarity_is_the_mean_over_both_directions_and_the_heaviest_shared_terms_come_first(packed):
    plan, store, tokenizer = packed(["zz yy aa xx  zz yy", "aa q1 q2 q3   aa", "aa r1 r2 r3   aa"] * 2, length=14, **PAIRS, min_tokens=2)
    found = quality.measure(plan, store, tokenizer, read=100)
    terms = quality._Terms.of(plan, np.arange(len(plan.segments) - 1), store, tokenizer)
    for number, members in found.read:
        scores = quality.pair_scores(terms.bags, plan.groups[[number]])[0]
        assert math.isclose(members[0].similarity, (scores[0, 1] + scores[1, 0]) / 2, rel_tol=1e-6)
    assert found.read[[number for number, _ in found.read].index(0)][1][0].shared == ["zz", "yy"]


def test_a_sample_measures_fewer_groups_and_the_same_seed_the_same_ones(packed):
    plan, store, tokenizer = packed(documents(60), length=18, **PAIRS, min_tokens=4)
    one, again, other = (quality.measure(plan, store, tokenizer, sample=7, seed=seed, read=7) for seed in (1, 1, 2))
    assert one.measured == 7
    assert one.figures() == again.figures()
    assert [number for number, _ in one.read] == [number for number, _ in again.read] != [number for number, _ in other.read]


def test_frequencies_are_counted_in_a_sample_when_there_are_many_segments(packed, monkeypatch):
    plan, store, tokenizer = packed(documents(60), length=18, **PAIRS, min_tokens=4)
    monkeypatch.setattr(quality, "COUNTED", 20)
    found = quality.measure(plan, store, tokenizer, sample=3)
    assert 20 <= found.counted <= 32
    assert found.in_group.bm25 > found.random.bm25


def test_tokens_are_the_terms_where_the_plan_says_so(packed):
    plan, store, tokenizer = packed(documents(10), length=18, **PAIRS, min_tokens=4, bm25={"terms": "tokens"})
    _, members = quality.measure(plan, store, tokenizer, read=1).read[0]
    assert all(len(term) <= 1 for member in members for term in member.shared)


def test_groups_of_one_have_counts_and_text_only(packed):
    plan, store, tokenizer = packed(["some text"], length=18)
    found = quality.measure(plan, store, tokenizer, read=3)
    assert (found.in_group, found.random) == (None, None)
    assert found.counts["fill_rate"] == 10 / 16
    assert [member.text for _, members in found.read for member in members] == ["some text"]
    assert json.loads(json.dumps(found.figures())) == found.figures()


@pytest.fixture
def published(tmp_path, byte_tokenizer):
    """A run's directory with a tokenize and a pack artifact."""
    tokenizer = tokenizers.load(byte_tokenizer)
    work = {stage: tmp_path / "runs" / f"{stage}-{digest[:8]}.partial" for stage, digest in (("tokenize", "a" * 64), ("pack", "b" * 64))}
    (work["tokenize"] / "train").mkdir(parents=True)
    tokenizer.save_pretrained(work["tokenize"] / "tokenizer")
    with Writer(work["tokenize"] / "train" / "00000", np.uint16) as writer:
        writer.add(np.arange(5, 100))
    store = Store.open(work["tokenize"] / "train")
    make(work["pack"] / "train", PackSettings(length=16), "encoder", store, tokenizer)
    make(work["pack"] / "valid", PackSettings(length=16), "encoder", None, tokenizer)
    made = {}
    for stage, digest, inputs in (("tokenize", "a" * 64, {}), ("pack", "b" * 64, {"tokenize": "a" * 64})):
        made[stage] = artifacts.publish(work[stage], stage=stage, digest=digest, settings={}, inputs=inputs, metrics={}, started=0.0).path
    return made


def test_store_and_tokenizer_are_found_beside_the_plan(published, monkeypatch):
    for directory in (published["pack"], published["pack"] / "train"):
        plan, store, _ = quality.open_plan(directory)
        assert (plan.directory, int(store.lengths.sum())) == (published["pack"] / "train", 95)
    monkeypatch.chdir(published["pack"] / "train")
    assert len(quality.open_plan(quality.Path("."))[0].groups) == 7


def test_a_moved_plan_needs_to_be_told_where_they_are(published, tmp_path):
    (published["pack"] / "train").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"moved: not inside what pack made.*give --store DIR and --tokenizer DIR"):
        quality.open_plan(tmp_path / "moved")
    plan, _, _ = quality.open_plan(tmp_path / "moved", published["tokenize"] / "train", published["tokenize"] / "tokenizer")
    assert plan.directory == tmp_path / "moved"


def test_what_is_no_plan_is_refused(published, tmp_path):
    with pytest.raises(UserError, match="no plan here"):
        quality.open_plan(tmp_path)
    with pytest.raises(UserError, match="the plan has no segments"):
        quality.open_plan(published["pack"] / "valid")
    published["tokenize"].rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"tokenize-aaaaaaaa, is not there; give --store DIR"):
        quality.open_plan(published["pack"])


def test_another_store_is_refused(published, tmp_path):
    (tmp_path / "other").mkdir()
    with Writer(tmp_path / "other" / "00000", np.uint16) as writer:
        writer.add(np.arange(6, 101))
    with pytest.raises(UserError, match="the plan was made with token store"):
        quality.open_plan(published["pack"], tmp_path / "other", published["tokenize"] / "tokenizer")
