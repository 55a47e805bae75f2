"""Words are found without decoding; the reference decodes."""

from __future__ import annotations

import random
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.packing import segments, terms

KINDS = ["unigram", "bpe", "bytes", "words", "byte-level", "wordpiece"]
END = 3
PIECES = ["the ", "The", "MODEL", " don't", "_", "1,000", "e.g.", "\n", "é", "É", "größer", "日本", "😀", "e\u0301", "\u0130", "Σ", " ", "<s>", "x"]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2581\ufffd")), st.lists(st.sampled_from(PIECES)).map("".join)
)


def listed(rows):
    return [part.tolist() for part in np.split(rows.terms, rows.offsets[1:-1])]


def decoded_words(tokenizer, ids):
    """The words of the text between special tokens."""
    runs = [list(run) for special, run in groupby(ids, key=lambda number: number < 5) if not special]
    return [word for run in runs for word in terms.words(tokenizer.decode(run))]


def same_partition(numbers, spelt):
    """Whether equal numbers stand exactly where equal words do."""
    assert [len(row) for row in numbers] == [len(row) for row in spelt]
    pairs = {(number, word) for row, names in zip(numbers, spelt, strict=True) for number, word in zip(row, names, strict=True)}
    return len(pairs) == len({number for number, _ in pairs}) == len({word for _, word in pairs})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1, max_size=6))
@example(texts=["Apple apple aPPle", "(e.g.) don't 1,000 x_y", "ÉÉ éé größer 日本x", "\U0001f600a\U0001d400b", "the model"])
def test_words_are_those_of_the_decoded_text_however_they_are_cut_into_pieces(trained, kind, texts, store_of):
    tokenizer = trained[kind]
    documents = [[*tokenizer(text, add_special_tokens=False)["input_ids"], END] for text in texts]
    store = store_of(documents)
    cut = segments.across(store.lengths, int(store.lengths.sum()))  # one row of all documents
    alone = segments.within(store.lengths, int(store.lengths.max()), 1)  # a row each
    spelt = [decoded_words(tokenizer, ids) for ids in documents]
    rows = listed(terms.rows(alone.pieces, alone.offsets, store, tokenizer, "words"))
    assert same_partition(rows, spelt)
    together = listed(terms.rows(cut.pieces, cut.offsets, store, tokenizer, "words"))
    assert together == [[number for row in rows for number in row]]


def test_a_word_is_the_same_in_capitals_cut_otherwise_and_as_bytes(trained, store_of):
    tokenizer = trained["bpe"]
    spell = tokenizer.get_vocab()
    as_bytes = [spell[f"<0x{byte:02X}>"] for byte in "großer".encode()]
    whole = tokenizer("großer GROßER Großer", add_special_tokens=False)["input_ids"]
    store = store_of([as_bytes, whole])
    cut = segments.within(store.lengths, 100, 1)
    assert listed(terms.rows(cut.pieces, cut.offsets, store, tokenizer, "words")) == [[0], [0, 0, 0]]


def test_special_tokens_and_piece_ends_part_words_and_an_unfinished_character_is_none(trained, store_of):
    tokenizer = trained["bytes"]
    a, b, lead = (5 + byte for byte in (ord("a"), ord("b"), 0xC3))
    store = store_of([[a, b, 4, a, b], [a, lead, b], [a, b]])
    within = segments.within(store.lengths, 100, 1)
    assert listed(terms.rows(within.pieces, within.offsets, store, tokenizer, "words")) == [[0, 0], [1, 2], [0]]
    # a row of two pieces, "b" and "ab": the word does not run over from one to the other
    pieces = np.array([[0, 4, 1], [2, 0, 2]])
    assert listed(terms.rows(pieces, np.array([0, 2]), store, tokenizer, "words")) == [[0, 1]]


def test_tokens_are_ids_without_special_ones(trained, store_of):
    store = store_of([[2, 10, 11, 4, 12, 3], [110, 0, 111, 3]])
    cut = segments.across(store.lengths, 8)
    assert listed(terms.rows(cut.pieces, cut.offsets, store, trained["bytes"], "tokens")) == [[10, 11, 12, 110], [111]]


def test_many_blocks_give_what_one_gives(trained, store_of, monkeypatch):
    tokenizer = trained["unigram"]
    draw = random.Random(5)
    documents = [tokenizer(" ".join(f"w{draw.randrange(400)}" for _ in range(50)), add_special_tokens=False)["input_ids"] + [END] for _ in range(40)]
    store = store_of(documents)
    cut = segments.across(store.lengths, 33)
    for kind in ("words", "tokens"):
        whole = terms.rows(cut.pieces, cut.offsets, store, tokenizer, kind)
        with monkeypatch.context() as patched:
            patched.setattr(terms, "_BLOCK", 100)
            assert [array.tolist() for array in terms.rows(cut.pieces, cut.offsets, store, tokenizer, kind)] == [array.tolist() for array in whole]
    assert Counter(whole.terms.tolist()) == Counter(id for document in documents for id in document if id != END)


def test_a_plan_without_segments_has_no_rows(trained, make_store):
    none = np.empty((0, 3), dtype=np.int64)
    for kind in ("words", "tokens"):
        rows = terms.rows(none, np.zeros(1, dtype=np.int64), make_store([1]), trained["bytes"], kind)
        assert (rows.terms.tolist(), rows.offsets.tolist()) == ([], [0])


def test_a_store_of_another_vocabulary_is_refused(trained, make_store):
    store = make_store([3, 3, 3])  # up to token 212
    cut = segments.across(store.lengths, 9)
    with pytest.raises(UserError, match="holds token 212, the tokenizer has 100"):
        small = trained["bytes"].__class__(tokenizer_object=trained["bytes"].backend_tokenizer)
        small.get_vocab = lambda: {"a": 99}
        terms.rows(cut.pieces, cut.offsets, store, small, "tokens")
