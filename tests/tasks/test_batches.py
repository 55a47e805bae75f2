from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tasks.batches import SORTED, TaskBatches
from pipeline.tasks.task import Example, Task


def words(count, first=0):
    return " ".join(f"w{first + number}" for number in range(count))


SINGLES = [Example(words(1 + number % 13, number), None, number % 3) for number in range(29)]
PAIRS = [Example(words(3), words(2, 50), 0.5), Example(words(1), words(30, 40), 1.5)]


@pytest.fixture(scope="session")
def make_batches(make_tokenizer):
    def make(examples=SINGLES, batch_size=8, seed=3, max_length=20, second_type=0, **options):
        task = Task({"train": examples}, ("a", "b", "c") if isinstance(examples[0].label, int) else (), ("accuracy",), max_length)
        return TaskBatches(examples, make_tokenizer(second_type), task, batch_size, seed, **options)

    return make


@settings(deadline=None)
@given(step=st.integers(0, 30), world=st.integers(1, 8))
def test_the_ranks_together_see_the_same_rows_whatever_their_number(make_batches, step, world):
    batches = make_batches()
    whole = batches.batch(step)
    parts = [batches.batch(step, rank, world) for rank in range(world)]
    for key, values in whole.items():
        assert np.array_equal(np.concatenate([part[key] for part in parts]), values)


def test_an_epoch_shows_every_example_once_and_the_next_in_another_order(make_batches):
    batches = make_batches(batch_size=29)
    assert batches.steps_per_epoch == 1.0
    first, second = batches.batch(0)["example"], batches.batch(1)["example"]
    assert sorted(first) == sorted(second) == list(range(29))
    assert first.tolist() != second.tolist()


def test_few_examples_by_length_are_sorted_within_an_epoch(make_batches):
    batches = make_batches(SINGLES[:12], batch_size=4, by_length=True)
    for first in (0, 3, 6):
        assert sorted(np.concatenate([batches.batch(step)["example"] for step in range(first, first + 3)])) == list(range(12))


def test_batches_by_length_deal_the_same_examples_out_among_sixteen_batches(make_batches):
    mixed, grouped = (make_batches(SINGLES * 2, batch_size=2, by_length=by_length) for by_length in (False, True))
    for first in (0, SORTED):
        rows = [[batches.batch(step) for step in range(first, first + SORTED)] for batches in (mixed, grouped)]
        examples = [np.concatenate([row["example"] for row in found]) for found in rows]
        assert sorted(examples[0]) == sorted(examples[1])
        spreads = [[int(np.ptp(row["attention_mask"].sum(1))) for row in found] for found in rows]
        assert max(spreads[1]) <= 2 < np.mean(spreads[0])
        shortest = [row["attention_mask"].sum(1).min() for row in rows[1]]
        assert shortest != sorted(shortest)
    parts = [grouped.batch(5, rank, 2)["example"] for rank in range(2)]
    assert np.concatenate(parts).tolist() == grouped.batch(5)["example"].tolist()
    assert grouped.fingerprint != mixed.fingerprint


def test_rows_hold_tokens_labels_and_padding_to_a_multiple_of_eight(make_batches):
    rows = make_batches().rows(np.array([6, 1]))
    assert rows["input_ids"].tolist() == [[2, *range(11, 18), 3, *[0] * 7], [2, 6, 7, 3, *[0] * 12]]
    assert rows["attention_mask"].sum(1).tolist() == [9, 4]
    assert rows["labels"].tolist() == [0, 1]
    assert rows["example"].tolist() == [6, 1]
    assert all(values.dtype == np.int64 for values in rows.values())


def test_rows_are_never_padded_beyond_max_length(make_batches):
    assert make_batches(max_length=13).rows(np.array([12]))["input_ids"].shape == (1, 13)


def test_of_a_pair_that_is_too_long_the_longer_text_is_cut(make_batches):
    rows = make_batches(PAIRS).rows(np.array([1, 0]))
    assert rows["input_ids"][0].tolist() == [2, 5, 3, *range(45, 61), 3]
    assert rows["labels"].dtype == np.float32
    assert rows["labels"].tolist() == [1.5, 0.5]


def test_token_types_are_given_where_the_tokenizer_tells_texts_apart_by_them(make_batches):
    assert "token_type_ids" not in make_batches(PAIRS).rows(np.array([0]))
    types = make_batches(PAIRS, second_type=1).rows(np.array([0]))["token_type_ids"]
    assert types.tolist() == [[0] * 5 + [1] * 3]


def test_the_fingerprint_tells_what_is_trained_on_and_in_which_order(make_batches):
    relabelled = [*SINGLES[:-1], Example(SINGLES[-1].text, None, 0)]
    kinds = [make_batches(), make_batches(batch_size=4), make_batches(seed=4), make_batches(max_length=9), make_batches(relabelled)]
    assert len({batches.fingerprint for batches in kinds}) == 5
    assert make_batches().fingerprint == kinds[0].fingerprint


def test_more_ranks_than_rows_are_refused(make_batches):
    with pytest.raises(UserError, match="9 ranks share a batch of 8 examples"):
        make_batches().batch(0, 0, 9)
