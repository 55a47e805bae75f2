"""Where rows are cut: documents' lengths -> pieces and segments. No token is read.

A piece is (document, start, length); a segment is a run of pieces that fills one row. Everything is vectorised: a corpus of
10^8 documents takes a few sorted arrays, no Python loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """pieces: int64 [P, 3]; offsets: int64 [N + 1] into pieces; dropped: tokens that are in no segment."""

    pieces: Ints
    offsets: Ints
    dropped: int

    @property
    def documents(self) -> Ints:
        """int64 [N]: the document that each segment begins in."""
        return self.pieces[self.offsets[:-1], 0]


def across(lengths: Ints, tokens_per_row: int) -> Segments:
    """Fixed length, running over document ends. Every token is in exactly one segment; only the last segment can be short.

    lengths: int64 [documents], tokens of each. Lengths 3, 4, 2 in rows of 5 are cut to (0,0,3)(1,0,2) | (1,2,2)(2,0,2):
    pieces begin wherever a document or a row does.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    document_starts = ends - lengths
    row_starts = np.arange(0, total, tokens_per_row, dtype=np.int64)
    cuts = np.concatenate([document_starts[lengths > 0], row_starts])
    cuts.sort(kind="stable")  # merges the two sorted runs; np.union1d hashes and takes minutes here
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    documents = np.searchsorted(ends, cuts, side="right")
    pieces = np.stack([documents, cuts - document_starts[documents], np.diff(cuts, append=total)], axis=1)
    return Segments(pieces, np.append(np.searchsorted(cuts, row_starts), len(cuts)), dropped=0)


def within(lengths: Ints, tokens_per_row: int, min_tokens: int) -> Segments:
    """Never over a document end: each document is cut into full rows and one short row, dropped when below `min_tokens`.

    lengths: int64 [documents]. The segments of a document are neighbours in the numbering, in order.
    """
    full, tails = np.divmod(lengths, tokens_per_row)
    dropped = tails < min_tokens
    counts = full + ~dropped
    documents = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    first = np.cumsum(counts) - counts
    starts = (np.arange(len(documents)) - first[documents]) * tokens_per_row
    pieces = np.stack([documents, starts, np.minimum(tokens_per_row, lengths[documents] - starts)], axis=1)
    return Segments(pieces, np.arange(len(documents) + 1, dtype=np.int64), dropped=int(tails[dropped].sum()))
