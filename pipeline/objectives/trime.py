"""TRIME: training with in-batch memory (Zhong, Lei & Chen 2022, "Training Language Models with Memory Augmentation").

With f(c) the hidden state of a context, g(c) its memory state (the input of the last feed-forward block), and the memory M of pairs (g_j, x_j):

    P(w | c)  ~  exp(E_w f(c))  +  sum over j in M with x_j = w of exp(g(c) g_j / sqrt(d))                                   (equation 5)

The loss is -log P(x | c): logaddexp(log Z_vocabulary, log Z_memory) - logaddexp(E_x f(c), log sum of the entries whose value is x).
What M is makes the three objectives: the segment's own past (`trimelm`), all earlier positions of a group of consecutive segments
(`trimelm_long`), or every other segment of a group of similar ones besides the own past (`trimelm_ext`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.vocabulary import linear_scores, scores_of
from pipeline.objectives import across_ranks
from pipeline.objectives.base import Batch
from pipeline.objectives.causal import Causal
from pipeline.objectives.memory_scores import Visible, log_sums
from pipeline.objectives.settings import TrimeExtSettings, TrimeSettings
from pipeline.packing.draws import uniform

ROW = 1024
"""Scores of a row that `chunk` counts on: of a smaller memory, more rows are summed at a time."""

LOCAL_DROPPED = 0
"""Stream of draws: whether a segment's own past is switched off."""


def trime_loss(
    vocab_logits: Tensor,
    targets: Tensor,
    queries: Tensor,
    memory_keys: Tensor,
    memory_targets: Tensor,
    visible: Tensor | Callable[[int, int], Tensor],
    *,
    scale: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Token losses [N] in nats (equation 5); exactly the cross-entropy where a row sees no entry.

    vocab_logits [N, V], targets int64 [N], queries [N, d], memory_keys [M, d], memory_targets int64 [M]; visible: bool [N, M], or a function
    (start, stop) -> bool [stop - start, M]. scale: default 1 / sqrt(d). chunk: rows of memory scores held at a time, None all.
    Gradients reach logits, queries and keys. `trime_loss_of_states` does without [N, V] too.
    """
    sums = _memory(queries, targets, memory_keys, memory_targets, visible, scale, chunk)
    return joint_loss(*scores_of(vocab_logits, targets), *sums)


def trime_loss_of_states(
    hidden: Tensor,
    output_embedding: Tensor,
    targets: Tensor,
    queries: Tensor,
    memory_keys: Tensor,
    memory_targets: Tensor,
    visible: Tensor | Callable[[int, int], Tensor],
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """`trime_loss` of hidden states [N, h] and an output embedding [V, h] (bias [V]): with `chunk`, neither [N, V] nor [N, M] is ever held."""
    sums = _memory(queries, targets, memory_keys, memory_targets, visible, scale, chunk)
    return joint_loss(*linear_scores(hidden, output_embedding, bias, targets, chunk), *sums)


def joint_loss(partition: Tensor, target: Tensor, every: Tensor, positive: Tensor) -> Tensor:
    """Equation 5's loss of log sums: of the vocabulary, its target, the memory's entries and those with the target; all of one shape."""
    return torch.logaddexp(partition, every) - torch.logaddexp(target, positive)


def _memory(
    queries: Tensor,
    targets: Tensor,
    keys: Tensor,
    key_targets: Tensor,
    visible: Tensor | Callable[[int, int], Tensor],
    scale: float | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    def block(groups: slice, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(len(queries))
        return (visible[start:stop] if isinstance(visible, Tensor) else visible(start, stop)).unsqueeze(0)

    scale = queries.shape[1] ** -0.5 if scale is None else scale
    every, positive = log_sums(queries[None], targets[None], keys[None], key_targets[None], block, scale=scale, chunk=chunk)
    return every[0], positive[0]


class Trime(Causal, ABC):
    """Loss `trime`, in nats, of every target that `Causal` has. Plain cross-entropy in the first `ce_warmup_steps` steps.

    Besides, not trained on: `cross_entropy`, the vocabulary's side alone, and `memory_share`, the memory's share of the probability.
    Memory is looked up among the entries of one group: one row, or `rows` on each of `ranks` ranks, which follow one another in the batch.
    """

    figures = frozenset({"cross_entropy", "memory_share"})
    looks_back = True
    """No entry is seen that comes later in the group."""

    def __init__(self, settings: TrimeSettings, seed: int, *, ce_warmup_steps: int, rows: int = 1, ranks: int = 1, memory_module: str | None = None):
        super().__init__(settings.chunk, memory_module)
        self.settings, self.seed, self.ce_warmup_steps = settings, seed, ce_warmup_steps
        self.rows, self.ranks = rows, ranks
        self._team: Any = None

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        count = super().targets(batch)["causal"]
        return dict.fromkeys(("trime", *sorted(self.figures)), count)

    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        every = self.token_losses(model, batch, step)
        count = max(len(every["trime"]), 1)
        return {name: losses.sum() / count for name, losses in every.items()}

    def token_losses(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Each named loss of every target of a prepared batch, row by row: [targets]."""
        hidden, memory, labelled = self.read(model, batch)
        labels = batch["labels"][:, 1:]
        partition, target = self.reader(model).scores(hidden[labelled], labels[labelled], self.chunk)
        cross_entropy = partition - target
        if self.training and step < self.ce_warmup_steps:
            return {"trime": cross_entropy, "cross_entropy": cross_entropy.detach(), "memory_share": torch.zeros_like(cross_entropy)}
        every, positive = (sums.view_as(labels)[labelled] for sums in self._log_sums(memory, labels, batch))
        share = torch.sigmoid(every.detach() - partition.detach())
        return {"trime": joint_loss(partition, target, every, positive), "cross_entropy": cross_entropy.detach(), "memory_share": share}

    def _log_sums(self, states: Tensor, labels: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """states [B, L - 1, d], labels [B, L - 1] -> both log sums [groups, rows x (L - 1)]."""
        marks: Batch = {"labels": labels}
        marks |= {name: batch[name][:, 1:] for name in ("document", "offset", "local_kept") if name in batch}
        queries = self._grouped(states)
        query_marks = {name: self._grouped(mark) for name, mark in marks.items()}
        keys, key_marks, first = self._gathered(queries, query_marks)
        index = torch.arange(keys.shape[1], device=keys.device)
        length = labels.shape[1]
        visible = self._visibility(query_marks, key_marks, index, first, length, inside_documents="document_ids" in batch)
        own_segment = None if self.settings.key_gradients == "all" else _same(index // length, index[first : first + queries.shape[1]] // length)
        return log_sums(
            queries,
            query_marks["labels"],
            keys,
            key_marks["labels"],
            visible,
            scale=keys.shape[-1] ** -0.5,
            chunk=self.chunk and self.chunk * max(ROW // keys.shape[1], 1),
            key_gradient=own_segment,
        )

    def _grouped(self, tensor: Tensor) -> Tensor:
        """[B, L - 1, ...] -> [groups, rows x (L - 1), ...]."""
        return tensor.unflatten(0, (-1, self.rows)).flatten(1, 2)

    def _gathered(self, queries: Tensor, marks: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], int]:
        """Entries of the whole group, from all ranks that hold parts of it, and where this rank's part begins."""
        if self.ranks == 1:
            return queries, marks, 0
        if self._team is None:
            self._team = across_ranks.team(self.ranks)
        keys = across_ranks.gather(queries, self._team)
        gathered = {name: across_ranks.gather(mark, self._team) for name, mark in marks.items()}
        return keys, gathered, torch.distributed.get_rank(self._team) * queries.shape[1]

    def _visibility(self, query: Batch, key: Batch, index: Tensor, first: int, length: int, inside_documents: bool) -> Visible:
        """Which entries a query sees: those that have a target and that `sees` lets it; a past that ends where attention does."""

        def visible(groups: slice, rows: slice) -> Tensor:
            mine = index[first : first + query["labels"].shape[1]][rows].unsqueeze(-1)
            entries = index[: first + rows.stop] if self.looks_back else index
            here = {name: mark[groups, rows].unsqueeze(-1) for name, mark in query.items()}
            there = {name: mark[groups, None, : len(entries)] for name, mark in key.items()}
            past = entries < mine
            if inside_documents:
                past = past & (here["document"] == there["document"])
            same_segment = (entries[::length] // length == mine // length).repeat_interleave(length, -1)[:, : len(entries)]
            return self.sees(past, same_segment, here, there) & (there["labels"] != -100)

        return visible

    @abstractmethod
    def sees(self, past: Tensor, same_segment: Tensor, query: Batch, key: Batch) -> Tensor:
        """bool, broadcast to [groups, rows, M]. past: the entry comes earlier in the group (and in the same document, where attention ends there);
        same_segment: it is in the query's own segment; query [g, r, 1] and key [g, 1, M]: what the batch says of the targets of each.
        """


def _same(keys: Tensor, queries: Tensor) -> Visible:
    return lambda groups, rows: (keys == queries[rows].unsqueeze(-1)).unsqueeze(0)


class TrimeLocal(Trime):
    """`trimelm`: the segment's own past."""

    def sees(self, past: Tensor, same_segment: Tensor, query: Batch, key: Batch) -> Tensor:
        return past & same_segment


class TrimeLong(Trime):
    """`trimelm_long`: every earlier position of a group of consecutive segments."""

    def sees(self, past: Tensor, same_segment: Tensor, query: Batch, key: Batch) -> Tensor:
        return past


class TrimeExternal(Trime):
    """`trimelm_ext`: every other segment of the group, but not what comes later in the query's own document; and the segment's own past,
    which in training is switched off for a segment with probability `local_dropped`, by draws of (seed, step, segment).
    """

    settings: TrimeExtSettings
    looks_back = False

    def prepare(self, batch: Batch, step: int) -> Batch:
        drawn = uniform(self.seed, step, batch["segment"], 1, LOCAL_DROPPED)
        kept = drawn >= self.settings.local_dropped
        return super().prepare({**batch, "local_kept": kept.expand_as(batch["input_ids"])}, step)

    def sees(self, past: Tensor, same_segment: Tensor, query: Batch, key: Batch) -> Tensor:
        later = (key["document"] == query["document"]) & (key["offset"] >= query["offset"])
        own = past & same_segment & key["local_kept"] if self.training else past & same_segment
        return (~same_segment & ~later) | own
