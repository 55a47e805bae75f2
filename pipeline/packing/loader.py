"""Batches of a plan: arithmetic on the step, so any step of any rank of any world size is one call away."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numba
import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.store import Store, tokens_at
from pipeline.errors import UserError
from pipeline.packing.order import Order, share
from pipeline.packing.plan import SPECIALS, Plan
from pipeline.packing.segments import Ints
from pipeline.packing.word_spans import WordSpans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Loader:
    """Rows of a plan in the order of (seed, epoch), `batch_size` a step, without end.

    The groups of a global batch are divided among ranks in contiguous parts, so all ranks together see the same
    rows for every world size. An epoch's end falls inside a batch where it falls.

    batch_size: rows of a global batch over all ranks. A short group still takes all its rows: those it lacks hold no token but the
    special ones (a decoder's: one padding token), and have segment number -1.
    document_mask: whether batches say which document each token is from, for attention that stays inside documents.
    places: whether they say where in its document each token stands.
    words: whether they say which tokens are one word. rare: sorted uint64 hashes of words, whose tokens are marked too; see `WordSpans`.
    ranks_per_group: ranks, following one another, that hold equal parts of each group; its rows on one of them are the `unit`.
    Raises UserError when the plan is empty, damaged or made with another store or tokenizer, or the batch is not whole groups.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int,
        seed: int,
        document_mask: bool = False,
        places: bool = False,
        ranks_per_group: int = 1,
        words: bool = False,
        rare: NDArray[np.uint64] | None = None,
    ):
        plan.check(store, tokenizer)
        if len(plan.groups) == 0:
            raise UserError(f"{plan.directory}: the plan has no segments; give tokenize more text, or lower pack.min_tokens")
        if batch_size % plan.group_size:
            raise UserError(f"batch_size {batch_size} is not a multiple of the plan's group size {plan.group_size} ({plan.directory}); make it one")
        self.plan, self.store, self.batch_size, self.seed, self.document_mask = plan, store, batch_size, seed, document_mask
        assert plan.group_size % ranks_per_group == 0, f"groups of {plan.group_size} on {ranks_per_group} ranks"
        self.places, self.ranks_per_group = places, ranks_per_group
        self.unit = plan.group_size // ranks_per_group
        self.groups_per_batch = batch_size // plan.group_size
        self.steps_per_epoch = len(plan.groups) / self.groups_per_batch
        identity = f"{plan.fingerprint} {batch_size} {seed} {document_mask}"
        if rare is not None:
            identity += f" {hashlib.sha256(rare.tobytes()).hexdigest()}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        self._words = WordSpans(tokenizer, rare) if words or rare is not None else None
        self._order = Order(len(plan.groups), seed)
        self._specials = np.array([getattr(tokenizer, f"{role}_token_id") for role in SPECIALS[plan.kind]], dtype=np.int64)
        self._pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
        self.batch(0, 0, ranks_per_group)  # compiles, where no earlier process has

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Ints]:
        """That rank's rows of global batch `step`: those of `rows`, and `group` [B].

        group: which rows are of one group, numbered from 0 on each rank; ranks that share groups have the same ones.
        Raises UserError when a batch has fewer groups, or the plan fewer segments, than there are ranks.
        """
        together = self.ranks_per_group
        assert world % together == 0, f"{world} ranks, {together} to a group"
        have = min(self.groups_per_batch, len(self.plan.segments) - 1) * together
        if have < world:
            what = "groups in a batch" if have == self.groups_per_batch * together else f"segments in the plan {self.plan.directory}"
            each = "every rank needs one" if together == 1 else f"every {together} need one"
            raise UserError(f"{world} ranks share {have // together} {what}: {each}; use at most {have} ranks, a larger batch_size or more text")
        first, last = share(self.groups_per_batch, rank // together, world // together)
        numbers = self._order.at(step * self.groups_per_batch + np.arange(first, last))
        mine = rank % together * self.unit
        segment = self.plan.groups[numbers, mine : mine + self.unit].reshape(-1)
        return {**self.rows(segment), "group": np.repeat(np.arange(last - first), self.unit)}

    def rows(self, segment: Ints) -> dict[str, Ints]:
        """`input_ids` and `attention_mask` [B, L] of those segments, and `segment` [B] itself, the counter of draws; -1 makes an empty row.

        With the document mask also `document_ids` [B, L]: 0 for the tokens of the row's first piece of a document, 1 for those of the
        next, -1 for padding. [cls] belongs to the first, [sep] to the last. With places, `document` [B, L], the document's number in the store,
        and `offset` [B, L], its tokens before this one; -1 for special tokens and padding. With words also what `WordSpans` gives.
        Raises UserError when the plan points beyond the store, or with words when the store holds tokens that the tokenizer does not have.
        """
        segment = np.ascontiguousarray(segment)
        optional = (["document_ids"] if self.document_mask else []) + (["document", "offset"] if self.places else [])
        names = ["input_ids", "attention_mask", *optional]
        plan, store = self.plan, self.store
        # One block: of several, malloc gives the last back to the system at every batch, and its pages are zeroed anew.
        rows = dict(zip(names, np.empty((len(names), len(segment), plan.length), dtype=np.int64), strict=True))
        wrong = _fill(
            *(segment, plan.segments, plan.pieces, store.lengths, store.addresses, np.empty(0, store.dtype), self._specials, self._pad),
            *(rows["input_ids"], rows["attention_mask"], *(rows.get(name) for name in ("document_ids", "document", "offset"))),
        )
        if wrong >= 0:
            raise UserError(f"{plan.directory / 'pieces.npy'}: segment {wrong} is not in the token store; remove its directory and run pack again")
        if self._words is not None:
            rows |= self._words(segment, plan, store, len(self._specials) // 2)
        return {**rows, "segment": segment}


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _fill(  # type: ignore[no-untyped-def]
    segment, segments, pieces, lengths, addresses, like, specials, pad, input_ids, attention_mask, document_ids, documents, offsets
):
    """Writes the rows, each element once. -> what `_check` finds wrong, or -1."""
    lead = len(specials) // 2
    wrong = _check(segment, segments, pieces, lengths, addresses, like, input_ids[:, lead : input_ids.shape[1] - lead])
    if wrong >= 0:
        return wrong
    for row in range(len(segment)):
        first, beyond = (0, 0) if segment[row] < 0 else (segments[segment[row]], segments[segment[row] + 1])
        end = lead
        for piece in range(first, beyond):
            document, start, length = pieces[piece]
            tokens = tokens_at(addresses[document] + start * like.itemsize, length, like)
            room = input_ids[row, end : end + length]
            for i in range(length):
                room[i] = tokens[i]
            if document_ids is not None:
                document_ids[row, end : end + length] = piece - first
            if documents is not None:
                documents[row, end : end + length] = document
                for i in range(length):
                    offsets[row, end + i] = start + i
            end += length
        input_ids[row, end:] = pad
        if lead:
            input_ids[row, 0], input_ids[row, end] = specials
        used = max(end + lead, 1)  # one token at least is attended: attention over nothing is not a number
        attention_mask[row, :used] = 1
        attention_mask[row, used:] = 0
        if document_ids is not None:
            document_ids[row, :lead] = 0
            document_ids[row, end:used] = max(beyond - first - 1, 0)
            document_ids[row, used:] = -1
        if documents is not None:
            for marks in (documents, offsets):
                marks[row, :lead] = -1
                marks[row, end:] = -1
    return -1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _check(segment, segments, pieces, lengths, addresses, like, room):  # type: ignore[no-untyped-def]
    """-> the first segment that is not in the plan, points beyond the store, or does not fit into `room` [B, tokens per row]; else -1.

    Looks at each piece's first token too (put into the row, to be overwritten): here the cache misses of many rows overlap, where copying
    would wait for them one by one. That is half of the time.
    """
    for row in range(len(segment)):
        if segment[row] < 0:
            continue
        if segment[row] + 1 >= len(segments):
            return segment[row]
        first, beyond, left = segments[segment[row]], segments[segment[row] + 1], room.shape[1]
        if not 0 <= first <= beyond <= len(pieces):
            return segment[row]
        for piece in range(first, beyond):
            document, start, length = pieces[piece]
            if not (0 <= document < len(lengths) and start >= 0 and 0 < length <= min(lengths[document] - start, left)):
                return segment[row]
            room[row, 0] = tokens_at(addresses[document] + start * like.itemsize, length, like)[0]
            left -= length
    return -1
