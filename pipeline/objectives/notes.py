"""Taking notes on the fly (TNF; Wu et al., ICLR 2021, "Taking Notes on the Fly Helps Language Pre-training").

A dictionary holds a vector for each rare word: a mean of the contexts that the word was met in. It is read into the word's input, and thrown
away after pretraining. No gradient reaches it.

What the paper leaves open is settled so. Its window sum has one term more than it divides by, so the span's end is taken to be exclusive: a note is
the mean of the window's tokens, as many as there are. A note is not read where a token of its word is hidden: it would tell the answer. Of the
m contexts of a word in one global batch none comes first, so all of them enter at once (`after_step`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from pipeline.objectives.base import Batch
from pipeline.objectives.settings import NotesSettings

INIT_STD = 0.02


class Notes(nn.Module):
    """The dictionary of N words: buffers `table` fp32 [N, d], and `written` int64 [N], the contexts that entered each note.

    It is the trainee's side module: outside DeepSpeed, the same on every rank, written once an optimiser step. seed: the notes begin as
    N(0, 0.02) of it alone. Batches need what a loader with `rare` words adds: `word`, `note`, `occurrences`.
    """

    table: Tensor
    written: Tensor

    def __init__(self, settings: NotesSettings, words: int, width: int, seed: int):
        super().__init__()
        self.settings = settings
        draws = torch.Generator().manual_seed(seed)
        self.register_buffer("table", torch.randn(words, width, generator=draws) * INIT_STD)
        self.register_buffer("written", torch.zeros(words, dtype=torch.int64))
        self._taken: list[tuple[Tensor, Tensor, Tensor]] = []

    # -- reading ---------------------------------------------------------------------------------------------------

    def mixer(self, batch: Batch, project: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Tensor]:
        """What turns the input x [B, L, d] of a prepared batch (token + position) into (1 - lambda) x + lambda note, at the tokens of the
        rare words that are read; x elsewhere, bit for bit.

        project: a map from [..., d] to the width of x, for a network that is narrower than the notes.
        """
        weight, note = self.settings.weight, batch["note"].clamp(min=0)
        if weight == 0:
            return lambda x: x
        readable = self._readable(batch)[..., None]

        def mix(x: Tensor) -> Tensor:
            notes = F.embedding(note, self.table)
            notes = notes if project is None else project(notes.to(x.dtype)).float()
            if self.settings.norm == "embedding":
                notes = F.normalize(notes, dim=-1) * x.detach().float().norm(dim=-1, keepdim=True)
            return torch.where(readable, ((1 - weight) * x.float() + weight * notes).to(x.dtype), x)

        return mix

    def _readable(self, batch: Batch) -> Tensor:
        """bool [B, L]: tokens of rare words whose note is read."""
        note, word = batch["note"], batch["word"].clamp(min=0)  # what is no word is no target
        readable = note >= 0
        if not self.settings.read_on_masked:
            hidden = torch.zeros_like(word).scatter_reduce(1, word, (batch["labels"] != -100).long(), "amax")
            readable = readable & (hidden.gather(1, word) == 0)
        if self.settings.warm:
            readable = readable & (self.written[note.clamp(min=0)] > 0)
        return readable

    # -- writing ---------------------------------------------------------------------------------------------------

    def collect(self, batch: Batch, last_hidden_state: Tensor) -> None:
        """Takes the notes of a micro-batch: for every rare word [s, t) the mean of the hidden states c_j [B, L, d] over the window
        [max(first, s - k), min(end, t + k)) in its piece [first, end) of a document. Takes none in evaluation, nor without gradients.

        The means are one matrix product in fp32: a prefix sum would lose digits where a unit's states are far from 0.
        """
        if not (self.training and torch.is_grad_enabled()):
            return
        number, begin, end, first, last = batch["occurrences"].unbind(-1)  # [B, R]
        low, high = torch.maximum(begin - self.settings.window, first), torch.minimum(end + self.settings.window, last)
        at = torch.arange(last_hidden_state.shape[1], device=low.device)
        within = ((at >= low[..., None]) & (at < high[..., None])).float()  # [B, R, L]
        with torch.autocast(last_hidden_state.device.type, enabled=False):
            notes = (within / (high - low).clamp(min=1)[..., None]) @ last_hidden_state.detach().float()
        self._taken.append((number.flatten(), notes.flatten(0, 1), self._counts(batch)))

    def _counts(self, batch: Batch) -> Tensor:
        """int64 [6]: tokens of text, those of rare words; rows, those with a rare word; rare words, those that are read."""
        number, begin = batch["occurrences"][..., 0], batch["occurrences"][..., 1]
        read = self._readable(batch).gather(1, begin.clamp(min=0)) & (number >= 0)
        word, note = batch["word"], batch["note"]
        counts = ((word >= 0), (note >= 0), (word >= 0).any(1), (note >= 0).any(1), number >= 0, read)
        return torch.stack([count.sum() for count in counts])

    def optimizer(self) -> None:
        return None

    def before_step(self, step: int) -> None:
        self._taken.clear()

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float | Tensor]:
        """Writes the m notes of each word that all ranks took in this step, of mean n: Note <- (1 - gamma)^m Note + (1 - (1 - gamma)^m) n, which
        is m of the paper's writes of n one after another. Returns figures to log, on the device.

        All sizes are known beforehand, so that one rank does not wait for its device; several do, once, to learn the largest size.
        """
        number, notes, counts = (torch.cat(parts) for parts in zip(*self._taken, strict=True))
        self._taken.clear()
        counts = counts.view(-1, 6).sum(0)
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(counts)
            number, notes = _of_all_ranks(number, notes)
        order = number.argsort(stable=True)  # of one word in the order of rows
        number, notes = number[order], notes[order]
        begins = torch.cat([torch.ones_like(number[:1], dtype=torch.bool), number[1:] != number[:-1]])
        place = begins.cumsum(0) - 1
        times = torch.zeros_like(number).scatter_add(0, place, torch.ones_like(number))
        words = torch.full_like(number, -1).scatter(0, place, number)  # [M]: each word once, -1 where there is none
        mean = torch.segment_reduce(notes, "sum", lengths=times, axis=0, unsafe=True) / times.clamp(min=1)[:, None]

        there, words = words >= 0, words.clamp(min=0)
        old = F.embedding(words, self.table)
        share = (1 - (1 - self.settings.decay) ** times.double()).float()
        change = (share * there)[:, None] * (mean - old)
        self.table.index_add_(0, words, change)  # adding 0 where there is none; the others are apart
        self.written.index_add_(0, words, times * there)
        return self._figures(counts, there, old, change)

    def _figures(self, counts: Tensor, there: Tensor, old: Tensor, change: Tensor) -> dict[str, float | Tensor]:
        tokens, rare_tokens, rows, rare_rows, rare, read = counts.double().unbind()
        found = there.sum().clamp(min=1)
        drift = change.norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-12)
        return {
            "coverage": rare_tokens / tokens.clamp(min=1),
            "rows_with_rare_words": rare_rows / rows.clamp(min=1),
            "hits": read / rare.clamp(min=1),
            "note_norm": ((old + change).norm(dim=-1) * there).sum() / found,
            "note_drift": (drift * there).sum() / found,
            "words_written": (self.written > 0).sum(),
        }


def _of_all_ranks(number: Tensor, notes: Tensor) -> tuple[Tensor, Tensor]:
    """[M] and [M, d] of each rank, M its own -> those of all ranks, one after another, filled up with numbers of -1."""
    largest = torch.tensor(len(number), device=number.device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    missing, ranks = int(largest) - len(number), distributed.get_world_size()
    number, notes = F.pad(number, (0, missing), value=-1), F.pad(notes, (0, 0, 0, missing))
    numbers, all_notes = number.new_empty(ranks * len(number)), notes.new_empty(ranks * len(notes), notes.shape[1])
    distributed.all_gather_into_tensor(numbers, number)
    distributed.all_gather_into_tensor(all_notes, notes)
    return numbers, all_notes
