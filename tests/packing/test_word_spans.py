"""Which tokens are one word; the reference spells rows out byte by byte."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.packing import segments, terms
from pipeline.packing.word_spans import WordSpans

END = 3
TEXTS = ["a", "aa aa", "日本日 aé-éa", "The Dogecoin DOGECOIN dogecoin,coin", "größer É日本 x_1 don't", "U.S. 1,000 \U0001f600a\U0001d400b", ""]


def words_of(tokenizer, ids):
    """The words of a document: text, and the set of the tokens (places) that have a part of it."""
    texts = [text if isinstance(text, bytes) else text.encode() for text in terms._texts(tokenizer)]
    spelt = [(byte, at) for at, number in enumerate(ids) for byte in texts[number]]
    found, byte, inside = [], 0, False
    for character in bytes(byte for byte, _ in spelt).decode(errors="surrogateescape"):
        size = len(character.encode(errors="surrogateescape"))
        owners = {at for _, at in spelt[byte : byte + size]}
        byte += size
        if character.isalnum() and ord(character) < 0x40000:
            if not inside:
                found.append(("", set()))
            word, tokens = found[-1]
            found[-1] = (word + character.lower()[0], tokens | owners)
        inside = character.isalnum() and ord(character) < 0x40000
    return found


def expected(tokenizer, documents, pieces, length, numbers):
    """One row: `word`, `note`, `occurrences`, written out from the words of whole documents."""
    word, note, occurrences = [-1] * length, [-1] * length, []
    at, unit = 1, 0
    for number, (document, start, size) in enumerate(pieces):
        all_words = words_of(tokenizer, documents[document])
        here = range(start, start + size)
        together = []  # sets of tokens that are one unit
        for _, tokens in all_words:
            together = [each for each in together if not each & tokens] + [tokens.union(*(each for each in together if each & tokens))]
        units = {}
        for token in here:
            if documents[document][token] < 5:
                continue
            key = min(next((each for each in together if token in each), {token}))
            units.setdefault(key, unit + len(units))
            word[at + token - start] = units[key]
        unit += len(units)
        edges = (0 if number == 0 else at, at + size + (number == len(pieces) - 1))
        for text, tokens in all_words:
            if text in numbers and tokens in together and tokens <= set(here) and sum(not tokens.isdisjoint(other) for _, other in all_words) == 1:
                low, high = at + min(tokens) - start, at + max(tokens) + 1 - start
                note[low:high] = [numbers[text]] * (high - low)
                occurrences.append([numbers[text], low, high, *edges])
        at += size
    return word, note, occurrences


@pytest.mark.parametrize("kind", ["unigram", "bpe", "bytes", "words", "byte-level", "wordpiece"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=5), length=st.integers(3, 14), half=st.booleans())
@example(texts=TEXTS, length=6, half=False)
def test_words_and_notes_of_rows_are_those_of_the_documents_wherever_rows_cut_them(trained, kind, texts, length, half, store_of, hash_of):
    tokenizer = trained[kind]
    documents = [[*tokenizer(text, add_special_tokens=False)["input_ids"], END] for text in texts]
    store = store_of(documents)
    cut = segments.across(store.lengths, length - 2)
    spelt = sorted({word for ids in documents for word, _ in words_of(tokenizer, ids)}, key=hash_of)[:: 2 if half else 1]
    rare = np.array([hash_of(word) for word in spelt], dtype=np.uint64)
    plan = SimpleNamespace(segments=cut.offsets, pieces=cut.pieces, length=length)
    segment = np.arange(len(cut.offsets) - 1)
    rows = WordSpans(tokenizer, rare)(segment, plan, store, 1)
    for row in segment:
        pieces = cut.pieces[cut.offsets[row] : cut.offsets[row + 1]].tolist()
        word, note, occurrences = expected(tokenizer, documents, pieces, length, {text: number for number, text in enumerate(spelt)})
        assert rows["word"][row].tolist() == word
        assert rows["note"][row].tolist() == note
        assert [each for each in rows["occurrences"][row].tolist() if each[0] >= 0] == occurrences
    assert (WordSpans(tokenizer)(segment, plan, store, 1)["word"] == rows["word"]).all()


def test_a_word_cut_by_the_rows_edge_is_a_unit_without_a_note(trained, store_of, hash_of):
    tokenizer = trained["bytes"]
    store = store_of([[5 + byte for byte in b"ab cde,"]])
    plan = SimpleNamespace(segments=np.array([0, 1, 2]), pieces=np.array([[0, 0, 5], [0, 5, 2]]), length=7)
    rare = np.sort(np.array([hash_of(word) for word in ("ab", "cd", "cde", "e")], dtype=np.uint64))
    rows = WordSpans(tokenizer, rare)(np.array([0, 1, -1]), plan, store, 1)
    assert rows["word"].tolist() == [[-1, 0, 0, 1, 2, 2, -1], [-1, 0, 1, -1, -1, -1, -1], [-1] * 7]
    ab = int(np.searchsorted(rare, np.uint64(hash_of("ab"))))
    assert rows["note"].tolist() == [[-1, ab, ab, -1, -1, -1, -1], [-1] * 7, [-1] * 7]
    assert rows["occurrences"].tolist() == [[[ab, 1, 3, 0, 7]], [[-1] * 5], [[-1] * 5]]


def test_a_store_of_another_vocabulary_is_refused(trained, store_of):
    plan = SimpleNamespace(segments=np.array([0, 1]), pieces=np.array([[0, 0, 1]]), length=3)
    with pytest.raises(UserError, match="holds token 60000, the tokenizer has 420"):
        WordSpans(trained["bpe"])(np.array([0]), plan, store_of([[7, 60000]]), 1)
