"""How often each word of a token store occurs, and which words are rare. A word is what `terms` says it is."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.store import Store, tokens_at
from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.packing.segments import Ints
from pipeline.packing.terms import Spelling, hash_words, number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHUNK = 1 << 16
"""Tokens of a document that are looked at together, and as many more as a word goes on."""


def count(store: Store, tokenizer: PreTrainedTokenizerFast, threads: int = 1) -> tuple[NDArray[np.uint64], Ints]:
    """Hashes uint64 [W] of the words, rising, and how often each occurs, int64 [W]; the same for any number of threads.

    Each thread reads a run of documents and keeps a table of its words, some 50 bytes each.
    Raises UserError when the store holds token ids that the tokenizer does not have.
    """
    spelling = Spelling.of(tokenizer)
    most = int(np.diff(spelling.first).max(initial=1))
    until = np.append(0, np.cumsum(store.lengths))
    cuts = np.searchsorted(until, np.linspace(0, until[-1], threads + 1)[1:-1])
    like = np.empty(0, store.dtype)

    def count_run(run: tuple[int, int]) -> tuple[NDArray[np.uint64], Ints, int]:
        first, last = run
        return _count(store.addresses[first:last], store.lengths[first:last], like, *spelling, most, _CHUNK)

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(count_run, pairwise([0, *cuts.tolist(), len(store)])))
    if (beyond := max(part[2] for part in parts)) >= 0:
        raise UserError(f"the token store holds token {beyond}, the tokenizer has {spelling.vocabulary}; use the tokenizer that made the store")
    hashes, place = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.zeros(len(hashes), dtype=np.int64)
    np.add.at(counts, place, np.concatenate([part[1] for part in parts]))
    return hashes, counts


def rare(frequency: tuple[int, int], store: Store, tokenizer: PreTrainedTokenizerFast, ranks: Ranks, directory: Path) -> NDArray[np.uint64]:
    """Hashes uint64 [N], rising, of the words that occur so often, both ends included. Every rank gets them.

    The first rank counts, and keeps them in `directory`, so that a stage that goes on does not count again.
    Raises UserError when there are none.
    """
    file = directory / "rare-words.npy"
    if ranks.first and not file.exists():
        hashes, counts = count(store, tokenizer, ranks.threads)
        low, high = frequency
        found = hashes[(counts >= low) & (counts <= high)]
        if not len(found):
            raise UserError(_none(low, high, counts))
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".tmp")
        with open(unfinished, "wb") as written:
            np.save(written, found)
        os.replace(unfinished, file)
    ranks.barrier()
    return np.load(file, allow_pickle=False)


def _none(low: int, high: int, counts: Ints) -> str:
    """Says that a range selects nothing, and what there is."""
    message = f"pretrain.notes.frequency [{low}, {high}]: no word of the corpus occurs so often. "
    if not len(counts):
        return f"{message}It has no words that consist of letters or digits; leave notes out"
    fewer, more = counts[counts < low], counts[counts > high]
    sides = [(fewer, "less often"), (more, "more often")]
    there = " and ".join(f"{len(side):,} words occur {what}, {side.min():,} to {side.max():,} times" for side, what in sides if len(side))
    most = int(fewer.max()) if len(fewer) else 5 * int(more.min())
    return f"{message}{there}. Set it to what there is, as [{max(most // 5, 1)}, {most}], or give tokenize more text"


@numba.njit(cache=True, nogil=True)
def _count(addresses, lengths, like, first, steps, letters, most, chunk):  # type: ignore[no-untyped-def]
    """-> the words' hashes, their counts, and a token beyond the vocabulary, or -1."""
    found = np.empty(chunk * most, dtype=np.uint64)
    spans = np.empty((len(found), 2), dtype=np.int64)
    table, known = np.zeros((1 << 12, 2), dtype=np.uint64), 0
    counts = np.zeros(len(table), dtype=np.int64)
    for document in range(len(lengths)):
        tokens = tokens_at(addresses[document], lengths[document], like)
        start = 0
        while start < len(tokens):
            end = start
            while end < len(tokens):
                token = tokens[end]
                if not 0 <= token < len(first) - 1:
                    return found[:0], counts[:0], np.int64(token)
                breaks = steps[first[token], 0] == np.uint64(0) and steps[first[token], 1] == np.uint64(0)
                if end - start >= chunk and breaks:  # no word runs across
                    break
                end += 1
            if (end - start) * most > len(found):
                found = np.empty((end - start) * most, dtype=np.uint64)
                spans = np.empty((len(found), 2), dtype=np.int64)
            words = hash_words(tokens[start:end], first, steps, letters, found, spans)
            numbers, table, known = number(found[:words], table, known)
            if known > len(counts):
                counts = np.append(counts, np.zeros(2 * known - len(counts), dtype=np.int64))
            for each in numbers:
                counts[each] += 1
            start = end
    hashes = np.empty(known, dtype=np.uint64)
    for slot in range(len(table)):
        if table[slot, 0] != np.uint64(0):
            hashes[table[slot, 1]] = table[slot, 0]
    return hashes, counts[:known], -1
