"""Batches of a plan: arithmetic on the step, so any step of any rank of any world size is one call away."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import UserError
from pipeline.packing.order import Order, share
from pipeline.packing.plan import SPECIALS, Plan
from pipeline.packing.segments import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.corpus.store import Store


class Loader:
    """Rows of a plan in the order of (seed, epoch), `batch_size` a step, without end.

    The groups of a global batch are divided among ranks in contiguous parts, so all ranks together see the same
    rows for every world size, and a group is on one rank. An epoch's end falls inside a batch where it falls.

    batch_size: rows of a global batch over all ranks. A short group still takes `unit` rows: those it lacks hold no token but the
    special ones (a decoder's: one padding token), and have segment number -1.
    Raises UserError when the plan is empty, was made with another store or tokenizer, or the batch is not whole groups.
    """

    def __init__(self, plan: Plan, store: Store, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int):
        plan.check(store, tokenizer)
        if len(plan.groups) == 0:
            raise UserError(f"{plan.directory}: the plan has no segments; give tokenize more text, or lower pack.min_tokens")
        if batch_size % plan.group_size:
            raise UserError(f"batch_size {batch_size} is not a multiple of the plan's group size {plan.group_size} ({plan.directory}); make it one")
        self.plan, self.store, self.batch_size, self.seed = plan, store, batch_size, seed
        self.unit = plan.group_size
        self.groups_per_batch = batch_size // self.unit
        self.steps_per_epoch = len(plan.groups) / self.groups_per_batch
        self.fingerprint = hashlib.sha256(f"{plan.fingerprint} {batch_size} {seed}".encode()).hexdigest()
        self._order = Order(len(plan.groups), seed)
        self._specials = [getattr(tokenizer, f"{role}_token_id") for role in SPECIALS[plan.kind]]
        self._pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Ints]:
        """That rank's rows of global batch `step`: `input_ids` and `attention_mask` [B, L], `segment` and `group` [B].

        segment: the row's number in the plan, the counter of draws; group: which rows share a memory, numbered from 0 on each rank.
        Raises UserError when a batch has fewer groups, or the plan fewer segments, than there are ranks.
        """
        have = min(self.groups_per_batch, len(self.plan.segments) - 1)
        if have < world:
            what = "groups in a batch" if have == self.groups_per_batch else f"segments in the plan {self.plan.directory}"
            raise UserError(f"{world} ranks share {have} {what}: every rank needs one; use at most {have} ranks, a larger batch_size or more text")
        first, last = share(self.groups_per_batch, rank, world)
        numbers = self._order.at(step * self.groups_per_batch + np.arange(first, last))
        segment = self.plan.groups[numbers].reshape(-1)
        return {**self.rows(segment), "group": np.repeat(np.arange(last - first), self.unit)}

    def rows(self, segment: Ints) -> dict[str, Ints]:
        """`input_ids` and `attention_mask` [B, L] of those segments, and `segment` [B] itself; -1 makes an empty row."""
        plan = self.plan
        starts = plan.segments[segment]
        counts = np.where(segment < 0, 0, plan.segments[segment + 1] - starts)
        ends = np.cumsum(counts)
        documents, begins, lengths = plan.pieces[np.repeat(starts - ends + counts, counts) + np.arange(counts.sum())].T
        tokens_until = np.append(0, np.cumsum(lengths))
        tokens = tokens_until[ends] - tokens_until[ends - counts]  # [B]

        lead = 1 if self._specials else 0
        input_ids = np.full((len(segment), plan.length), self._pad, dtype=np.int64)
        room = input_ids[:, lead : lead + plan.tokens_per_row]
        flat = self.store.gather(documents, begins, lengths)
        if len(flat) == room.size:
            room[:] = flat.reshape(room.shape)
        else:
            room[np.arange(plan.tokens_per_row) < tokens[:, None]] = flat
        if self._specials:
            cls, sep = self._specials
            input_ids[:, 0] = cls
            input_ids[np.arange(len(segment)), tokens + 1] = sep
        # One token at least is attended: attention over nothing is not a number.
        used = np.maximum(tokens + len(self._specials), 1)
        attention_mask = (np.arange(plan.length) < used[:, None]).astype(np.int64)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "segment": segment}
