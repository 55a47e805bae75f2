from __future__ import annotations

import random
import time

import numpy as np
import pytest

from pipeline.corpus.duplicates import Duplicates, _word_hashes, signature

DRAW = random.Random(1)
VOCABULARY = [f"word{number}" for number in range(5000)]


def words(count):
    return DRAW.choices(VOCABULARY, k=count)


def jaccard(one, other):
    sets = [{tuple(text[at : at + 5]) for at in range(len(text) - 4)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text, share):
    """With a run of the text replaced."""
    count = int(len(text) * share)
    return words(count) + text[count:]


def test_a_word_has_one_hash_wherever_it_stands():
    one, two = _word_hashes(b"alpha  beta\ngamma"), _word_hashes(b"\t gamma alpha beta ")
    assert one[[2, 0, 1]].tolist() == two.tolist()
    assert len(set(one.tolist())) == 3


def test_the_estimate_is_the_jaccard_similarity_within_its_standard_error():
    errors = []
    for _ in range(200):
        one = words(300)
        two = edited(one, DRAW.random() * 0.5)
        errors.append((signature(" ".join(one)) == signature(" ".join(two))).mean() - jaccard(one, two))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.05


@pytest.mark.parametrize("threshold", [0.3, 0.8, 1.0])
def test_pairs_above_the_threshold_are_dropped_and_pairs_below_are_kept(threshold):
    above, below = [], []
    for _ in range(60):
        one = words(200)
        for share, found in (((1 - threshold) * 0.3, above), (1 - threshold * 0.5, below)):
            seen = Duplicates(threshold)
            assert seen.first_seen(" ".join(one))
            found.append(seen.first_seen(" ".join(edited(one, share))))
    assert sum(above) <= 1
    assert all(below)


def test_the_earlier_of_two_is_kept_and_unlike_texts_are_all_kept():
    seen = Duplicates(0.8)
    distinct = [" ".join(words(50)) for _ in range(300)]
    assert all(map(seen.first_seen, distinct))
    assert not any(map(seen.first_seen, distinct))
    assert not any(map(seen.first_seen, [text.upper() for text in distinct]))


def test_texts_shorter_than_a_shingle_are_compared_as_a_whole():
    seen = Duplicates(0.8)
    assert [seen.first_seen(text) for text in ("a b", "a b c", "A  b", "", " ")] == [True, True, False, True, False]


def test_one_thousand_texts_take_less_than_a_third_of_a_millisecond_each():
    texts = [" ".join(words(300)) for _ in range(1000)]
    seen = Duplicates(0.8)
    started = time.process_time()
    for text in texts:
        seen.first_seen(text)
    assert time.process_time() - started < 1.0  # 30,000 in 10 s, and room for a slow machine
