"""Which tokens of a row are one word, and which of them are of a rare word that has a note.

A word is what `terms` says it is; a segment may begin or end inside one. What stands in the document beside the segment tells, so a
word cut by an edge is known for one that is not whole: its tokens here are still one unit, but it has no note. Words that one token
holds parts of (such as `U.S`) are one unit together, without a note.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.store import Store, tokens_at
from pipeline.errors import UserError
from pipeline.packing.plan import Plan
from pipeline.packing.segments import Ints
from pipeline.packing.terms import Spelling, empty_table, hash_words, number, slot_of, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BESIDE = 4
"""Tokens that are read on either side of a piece: a character has at most so many bytes, each may be a token."""


class WordSpans:
    """Marks the words of rows. rare: sorted uint64 [N], the hashes of the words that have a note, whose number is its place here."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rare: NDArray[np.uint64] | None = None):
        self._spelling = Spelling.of(tokenizer)
        self._special = special_tokens(tokenizer, self._spelling.vocabulary)
        self._most = int(np.diff(self._spelling.first).max(initial=1))
        self._table = None if rare is None else number(rare, empty_table(), 0)[1]

    def __call__(self, segment: Ints, plan: Plan, store: Store, lead: int) -> dict[str, Ints]:
        """`word` int64 [B, L] of those segments' rows, which begin with `lead` special tokens and end with as many: rising from 0 in a row,
        the same for the tokens of a word; a token that is of no word has a number of its own, special tokens and padding -1.

        With rare words also `note` int64 [B, L], the number of the rare word that the token is of, else -1; and `occurrences` int64
        [B, R, 5], the rare words of a row in order: number, first token and the token after its last, the same of the piece it is in (special
        tokens at a row's ends are of the piece beside them). Rows with fewer than R end in -1.
        Raises UserError when the store holds token ids that the tokenizer does not have.
        """
        word = np.empty((len(segment), plan.length), dtype=np.int64)
        note = None if self._table is None else np.empty_like(word)
        beyond, occurrences = _mark(
            *(segment, plan.segments, plan.pieces, store.lengths, store.addresses, np.empty(0, store.dtype), lead),
            *(*self._spelling, self._most, self._special, self._table, word, note),
        )
        if beyond >= 0:
            raise UserError(
                f"the token store holds token {beyond}, the tokenizer has {self._spelling.vocabulary}; use the tokenizer that made the store"
            )
        return {"word": word} if note is None else {"word": word, "note": note, "occurrences": occurrences}


@numba.njit(cache=True, nogil=True)
def _mark(  # type: ignore[no-untyped-def]
    segment, segments, pieces, lengths, addresses, like, lead, first, steps, letters, most, special, table, word, note
):
    """Fills the rows of `word` and `note` -> a token beyond the vocabulary, or -1; the rare words [B, R, 5]. most: words that a token may hold."""
    rows, length = word.shape
    found = np.empty((length + 2 * _BESIDE) * most, dtype=np.uint64)
    spans = np.empty((len(found), 2), dtype=np.int64)
    kept = np.empty((rows if table is not None else 0, length, 5), dtype=np.int64)
    counts = np.zeros(rows, dtype=np.int64)
    for row in range(rows):
        word[row] = -1
        if table is not None:
            note[row] = -1
        begin, beyond = (0, 0) if segment[row] < 0 else (segments[segment[row]], segments[segment[row] + 1])
        at, units = lead, 0
        for piece in range(begin, beyond):
            document, start, size = pieces[piece]
            before, after = min(start, _BESIDE), min(lengths[document] - start - size, _BESIDE)
            tokens = tokens_at(addresses[document] + (start - before) * like.itemsize, before + size + after, like)
            for i in range(len(tokens)):
                if not 0 <= tokens[i] < len(special):
                    return np.int64(tokens[i]), kept
            words = hash_words(tokens, first, steps, letters, found, spans)
            units = _number_units(tokens[before : before + size], spans[:words], before, special, word[row, at : at + size], units)
            if table is not None:
                edges = (0 if piece == begin else at), at + size + (lead if piece + 1 == beyond else 0)
                counts[row] = _note_words(found[:words], spans[:words] - before, size, at, edges, table, note[row], kept[row], counts[row])
            at += size
    width = max(1, counts.max()) if rows else 1
    for row in range(len(kept)):
        kept[row, counts[row] : width] = -1
    return -1, kept[:, :width].copy()


@numba.njit(cache=True, nogil=True)
def _number_units(tokens, spans, before, special, unit, units):  # type: ignore[no-untyped-def]
    """Fills `unit` for a piece's tokens, which follow `before` others in `spans`, with numbers from `units` on -> the next."""
    each, until = 0, -1  # the next word that may begin here; the last token of the unit that we are in
    for i in range(len(tokens)):
        if i > until:
            units += not special[tokens[i]]
        while each < len(spans) and spans[each, 0] <= i + before:
            until = max(until, spans[each, 1] - before)
            each += 1
        unit[i] = -1 if special[tokens[i]] else units - 1
    return units


@numba.njit(cache=True, nogil=True)
def _note_words(hashes, spans, size, at, edges, table, note, kept, count):  # type: ignore[no-untyped-def]
    """Writes the rare words that lie whole in a piece, of `size` tokens from `at` on, into `note` [L] and `kept` [., 5] -> those there are now."""
    for each in range(len(hashes)):
        first, last = spans[each]
        shared = (each > 0 and spans[each - 1, 1] == first) or (each + 1 < len(spans) and spans[each + 1, 0] == last)
        slot = slot_of(hashes[each], table)
        if first < 0 or last >= size or shared or table[slot, 0] != hashes[each]:
            continue
        found = np.int64(table[slot, 1])
        note[at + first : at + last + 1] = found
        kept[count] = found, at + first, at + last + 1, edges[0], edges[1]
        count += 1
    return count
