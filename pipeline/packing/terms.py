"""Segments as rows of terms, from token ids: what BM25 matches.

A word is a maximal run of letters and digits, lower-cased character by character; whatever else stands between them, special tokens
among it, only parts words. Scripts without spaces have long words: match tokens there.

No row is decoded. The pieces of the vocabulary are, once, into steps: a run of word characters, a break, or a byte of a character
that pieces share. A run is known by its polynomial hash, hash(ab) = hash(a) * BASE^|b| + hash(b) modulo 2^64, so that a word has the
same hash however it was cut into pieces. One pass over the tokens then hashes the words and numbers them as they come, some 35 million
tokens a second on a core. Two words fall together with probability 2^-64 a pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.packing.segments import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pipeline.corpus.store import Store

_BASE = 0x9E3779B97F4A7C15
_SLOT = np.uint64(0xD6E8FEB86659FD93)
_CODES = 0x40000
"""Unicode has no letter from here on."""
_BLOCK = 1 << 18
"""Tokens read at a time."""
_WORD = re.compile(r"[^\W_]+")
_BYTE = re.compile("<0x([0-9A-F]{2})>")
_BREAK = (0, 0)


class Rows(NamedTuple):
    """terms: int32 [T], all rows end to end; offsets: int64 [N + 1], where each begins."""

    terms: NDArray[np.int32]
    offsets: Ints


def words(text: str) -> list[str]:
    """The words of a text, in order: what a word is, in plain Python."""
    return _WORD.findall("".join(character.lower()[0] for character in text))


def rows(pieces: Ints, offsets: Ints, store: Store, tokenizer: PreTrainedTokenizerFast, kind: Literal["words", "tokens"]) -> Rows:
    """The terms of each segment in order. Words are numbered by first appearance, tokens have their ids; special tokens are left out.

    pieces: int64 [P, 3] (document, start, length); offsets: int64 [N + 1] into pieces, as a plan has them. A word ends with its piece.
    Raises UserError when the store holds token ids that the tokenizer does not have.
    """
    make = _WordNumbers(tokenizer) if kind == "words" else _TokenNumbers(tokenizer)
    parts, counts = [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    for first, last in _blocks(pieces, offsets):
        block = pieces[offsets[first] : offsets[last]]
        tokens = store.gather(*block.T)
        if len(tokens) and tokens.max() >= make.vocabulary:
            raise UserError(f"the token store holds token {tokens.max()}, the tokenizer has {make.vocabulary}; use the tokenizer that made the store")
        ends = np.cumsum(block[:, 2])
        found, lengths = make(tokens, np.append(0, ends), offsets[first : last + 1] - offsets[first])
        parts.append(found)
        counts.append(lengths)
    return Rows(np.concatenate(parts), np.cumsum(np.concatenate(counts)))


def _blocks(pieces: Ints, offsets: Ints) -> Iterator[tuple[int, int]]:
    """Runs of segments [first, last) of about _BLOCK tokens."""
    until = np.append(0, np.cumsum(pieces[:, 2]))[offsets]
    cuts = np.unique(np.append(np.searchsorted(until, np.arange(0, until[-1], _BLOCK)), len(offsets) - 1))
    return zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)


def special_tokens(tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> NDArray[np.bool_]:
    special = np.zeros(vocabulary, dtype=bool)
    special[[*tokenizer.all_special_ids, *(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)]] = True
    return special


class _TokenNumbers:
    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        self._special = special_tokens(tokenizer, self.vocabulary)

    def __call__(self, tokens: NDArray[np.integer], starts: Ints, offsets: Ints) -> tuple[NDArray[np.int32], Ints]:
        kept = ~self._special[tokens]
        until = np.append(0, np.cumsum(kept))[starts[offsets]]
        return tokens[kept].astype(np.int32), np.diff(until)


class _WordNumbers:
    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._spelling = Spelling.of(tokenizer)
        self.vocabulary = self._spelling.vocabulary
        self._table, self._count = empty_table(), 0

    def __call__(self, tokens: NDArray[np.integer], starts: Ints, offsets: Ints) -> tuple[NDArray[np.int32], Ints]:
        found = np.empty(int(np.diff(self._spelling.first)[tokens].sum()), dtype=np.uint64)  # a word takes a step at least
        lengths = np.empty(len(offsets) - 1, dtype=np.int64)
        total = _hash_rows(tokens, starts, offsets, *self._spelling, found, lengths)
        numbers, self._table, self._count = number(found[:total], self._table, self._count)
        return numbers, lengths


class Spelling(NamedTuple):
    """The vocabulary as steps: those of token v are steps[first[v] : first[v + 1]].

    first: int32 [V + 1]. steps: uint64 [S, 2], see `_steps`. letters: uint64 by code point, see `_letters`.
    """

    first: NDArray[np.int32]
    steps: NDArray[np.uint64]
    letters: NDArray[np.uint64]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Spelling:
        letters = _letters().tolist()
        steps = [_steps(piece, letters) for piece in _texts(tokenizer)]
        first = np.cumsum([0, *map(len, steps)], dtype=np.int32)
        return cls(first, np.array([step for piece in steps for step in piece] or [_BREAK], dtype=np.uint64), _letters())

    @property
    def vocabulary(self) -> int:
        """Token ids there are."""
        return len(self.first) - 1


@cache
def _letters() -> NDArray[np.uint64]:
    """The lower-case form of each letter and digit, 0 for the other code points."""
    return np.array([ord(chr(code).lower()[0]) if chr(code).isalnum() else 0 for code in range(_CODES)], dtype=np.uint64)


def _texts(tokenizer: PreTrainedTokenizerFast) -> list[str | bytes]:
    """What each id adds to a text: a string, or bytes where it holds parts of characters. Special tokens, and ids without a token, part words."""
    decoder = tokenizer.backend_tokenizer.decoder
    after = decoder.decode(["a", "a"])[1:] if decoder else ""
    vocabulary = tokenizer.get_vocab()
    found: list[str | bytes] = [" "] * (max(vocabulary.values()) + 1)
    special = special_tokens(tokenizer, len(found))
    for piece, number in vocabulary.items():
        if special[number]:
            continue
        # Between two letters: spaces that a decoder takes from the ends of a text stay. After a line end `a` may stand without its space.
        text = decoder.decode(["a", piece, "a"])[1:].removesuffix("a").removesuffix(after[:-1]) if decoder else f" {piece}"
        found[number] = (_bytes(piece, text) if "\ufffd" in text else None) or text
    return found


def _bytes(piece: str, text: str) -> bytes | None:
    """The bytes of a piece that is not whole characters; None for one that really spells U+FFFD."""
    if single := _BYTE.fullmatch(piece):
        return bytes([int(single[1], 16)])
    if all(character in _BYTE_OF for character in piece):
        found = bytes(_BYTE_OF[character] for character in piece)
        return found if found.decode(errors="replace") == text else None
    return None


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters (Radford et al. 2019, GPT-2): printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _steps(piece: str | bytes, letters: list[int]) -> list[tuple[int, int]]:
    """(multiplier, addend) of a run of word characters, (0, 0) a break, (0, byte) a byte of 128 or more."""
    found: list[tuple[int, int]] = []
    codes = list(map(ord, piece)) if isinstance(piece, str) else [-byte if byte >= 128 else byte for byte in piece]
    for kind, run in groupby(codes, key=lambda code: -1 if code < 0 else code < _CODES and letters[code] > 0):
        if kind == -1:
            found += [(0, -code) for code in run]
        elif kind:
            multiplier, addend = 1, 0
            for code in run:
                multiplier, addend = multiplier * _BASE % 2**64, (addend * _BASE + letters[code]) % 2**64
            found.append((multiplier, addend))
        else:
            found.append(_BREAK)
    return found or [_BREAK]


@numba.njit(cache=True, nogil=True)
def _hash_rows(tokens, starts, offsets, first, steps, letters, found, lengths):  # type: ignore[no-untyped-def]
    """Fills `found` with the words' hashes, row after row, and `lengths`; -> words found."""
    total = 0
    spans = np.empty((len(found), 2), dtype=np.int64)
    for row in range(len(lengths)):
        before = total
        for piece in range(offsets[row], offsets[row + 1]):
            total += hash_words(tokens[starts[piece] : starts[piece + 1]], first, steps, letters, found[total:], spans)
        lengths[row] = total - before
    return total


@numba.njit(cache=True, nogil=True)
def hash_words(tokens, first, steps, letters, found, spans):  # type: ignore[no-untyped-def]
    """For compiled code: the words of these tokens, in order -> how many.

    Fills `found` with their hashes, and `spans` [., 2] with the first and the last token that has a part of each: written as a word goes on,
    which is three times as quick as at its end. Both need room for as many words as the tokens have steps.
    value: the hash of the word so far, 0 outside of words. need, code, lead: of an unfinished character the bytes it lacks, its code point so
    far, the token it begins in.
    """
    base, nothing = np.uint64(_BASE), np.uint64(0)
    total, value, code, need, lead = 0, nothing, 0, 0, 0
    for at in range(len(tokens)):
        token = tokens[at]
        for step in range(first[token], first[token + 1]):
            multiplier, addend = steps[step, 0], steps[step, 1]
            if multiplier != nothing and need == 0:
                if value == nothing:
                    spans[total, 0] = at
                spans[total, 1] = at
                value = value * multiplier + addend
                continue
            byte = np.int64(addend) if multiplier == nothing else 0
            if need > 0 and 128 <= byte < 192:
                need -= 1
                code = code << 6 | byte & 63
                if need > 0:
                    continue
                if code < len(letters) and letters[code] != nothing:
                    if value == nothing:
                        spans[total, 0] = lead
                    spans[total, 1] = at
                    value = value * base + letters[code]
                    continue
                byte = 0
            if byte < 192 or need > 0:  # a break, or a character left unfinished
                if value != nothing:
                    found[total] = value
                    total += 1
                value, need = nothing, 0
                if multiplier != nothing:
                    value, spans[total, 0], spans[total, 1] = addend, at, at
            if byte >= 192:
                need = 1 if byte < 224 else 2 if byte < 240 else 3
                code, lead = byte & (63 >> need), at
    if value != nothing:
        found[total] = value
        total += 1
    return total


def empty_table() -> NDArray[np.uint64]:
    """For `number`: (hash, number) a slot, a power of two of slots, hash 0 where empty."""
    return np.zeros((1 << 12, 2), dtype=np.uint64)


@numba.njit(cache=True, nogil=True)
def number(hashes, table, count):  # type: ignore[no-untyped-def]
    """int32 numbers of the hashes, new ones in turn after the `count` that the table holds; the table with them, at most half full; how many
    it holds now."""
    numbers = np.empty(len(hashes), dtype=np.int32)
    for at in range(len(hashes)):
        slot = slot_of(hashes[at], table)
        if table[slot, 0] == np.uint64(0):
            table[slot, 0], table[slot, 1] = hashes[at], count
            count += 1
        numbers[at] = table[slot, 1]
        if 2 * count > len(table):
            larger = np.zeros((2 * len(table), 2), dtype=np.uint64)
            for old in range(len(table)):
                if table[old, 0] != np.uint64(0):
                    larger[slot_of(table[old, 0], larger)] = table[old]
            table = larger
    return numbers, table, count


@numba.njit(cache=True, nogil=True)
def slot_of(value, table):  # type: ignore[no-untyped-def]
    """For compiled code: where a hash is, or should be, by linear probing."""
    last = np.uint64(len(table) - 1)
    mixed = value * _SLOT
    slot = (mixed ^ mixed >> np.uint64(32)) & last
    while table[slot, 0] != np.uint64(0) and table[slot, 0] != value:
        slot = (slot + np.uint64(1)) & last
    return slot
