"""Words are counted as a plain count of the text does."""

from __future__ import annotations

import random
from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.packing import terms, word_counts

END = 3
TEXTS = [
    " ".join(random.Random(number).choices(["the", "The", "größer", "日本", "dogecoin", "x_1", "U.S.", "don't", "1,000", "É"], k=60))
    for number in range(9)
]


@pytest.fixture(scope="module", params=["unigram", "bytes", "byte-level", "wordpiece"])
def corpus(request, trained, store_of):
    """A store, its tokenizer, and the counts of the decoded text."""
    tokenizer = trained[request.param]
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    runs = [list(run) for ids in documents for special, run in groupby(ids, key=lambda number: number < 5) if not special]
    spelt = Counter(word for run in runs for word in terms.words(tokenizer.decode(run)))
    return store_of([[*ids, END] for ids in documents]), tokenizer, spelt


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_counts_are_those_of_the_text_for_any_number_of_threads_and_any_chunk(corpus, hash_of, threads, chunk, monkeypatch):
    store, tokenizer, spelt = corpus
    monkeypatch.setattr(word_counts, "_CHUNK", chunk)
    hashes, counts = word_counts.count(store, tokenizer, threads)
    assert dict(zip(hashes.tolist(), counts.tolist(), strict=True)) == {hash_of(word): times for word, times in spelt.items()}
    assert (np.diff(hashes.astype(object)) > 0).all()


def test_rare_words_are_those_in_the_range_and_are_counted_once(trained, store_of, hash_of, tmp_path, monkeypatch):
    tokenizer = trained["bytes"]
    store = store_of([tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("b b b b a a", "a c c d b e e e")])
    found = word_counts.rare((2, 3), store, tokenizer, Ranks(), tmp_path / "scratch")
    assert found.tolist() == sorted(map(hash_of, "ace"))
    monkeypatch.setattr(word_counts, "count", None)
    assert (word_counts.rare((2, 3), store, tokenizer, Ranks(), tmp_path / "scratch") == found).all()


@pytest.mark.parametrize(
    ("frequency", "message"),
    [
        ((50, 70), r"\[50, 70\]: no word .* 5 words occur less often, 1 to 5 times. Set it to what there is, as \[1, 5\]"),
        ((4, 4), "4 words occur less often, 1 to 3 times and 1 words occur more often, 5 to 5 times"),
    ],
)
def test_a_range_without_a_word_says_what_counts_there_are(trained, store_of, tmp_path, frequency, message):
    store = store_of([trained["bytes"](text, add_special_tokens=False)["input_ids"] for text in ("b b b b a a", "a c c d b e e e")])
    with pytest.raises(UserError, match=message):
        word_counts.rare(frequency, store, trained["bytes"], Ranks(), tmp_path)


def test_a_corpus_without_words_and_a_store_of_another_vocabulary_are_refused(trained, store_of, tmp_path):
    with pytest.raises(UserError, match="leave notes out"):
        word_counts.rare((1, 2), store_of([[END], []]), trained["bytes"], Ranks(), tmp_path)
    with pytest.raises(UserError, match="holds token 60000, the tokenizer has 420"):
        word_counts.count(store_of([[7, 60000]]), trained["bpe"])
