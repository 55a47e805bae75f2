"""Sliding windows over text, and what a model makes of them.

Each token of the text is scored once, at its *place*: by the hidden state of the token before it. An *entry* of a memory is the memory
state at that same hidden state, its key, and the token at the place, its value; so entry j is visible to place i where j < i.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.corpus.store import Store
from pipeline.models.causal_reader import CausalReader

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """A stream of documents. tokens int64 [N]; document int64 [N]: the number in its store of the document each token is of."""

    tokens: Ints
    document: Ints

    @classmethod
    def of(cls, store: Store, documents: Ints, max_document_tokens: int | None = None) -> Text:
        """Those documents of a store, in that order, each cut after max_document_tokens."""
        lengths = store.lengths[documents]
        if max_document_tokens is not None:
            lengths = np.minimum(lengths, max_document_tokens)
        tokens = store.gather(documents, np.zeros(len(documents), dtype=np.int64), lengths).astype(np.int64)
        return cls(tokens, np.repeat(documents, lengths))

    def __len__(self) -> int:
        return len(self.tokens)

    def beginnings(self) -> Ints:
        """Places where a document begins, and the end of the stream."""
        changes = np.flatnonzero(np.diff(self.document)) + 1
        return np.concatenate([np.zeros(min(len(self), 1), dtype=np.int64), changes, np.full(1, len(self), dtype=np.int64)])


def windows(text: Text, block: int, context: int, *, within_documents: bool) -> Ints:
    """int64 [W, 3]: each window (begin, first, end) reads tokens[begin : end - 1] and scores the places first .. end - 1.

    The places of all windows are those of the text in order, `block` in each, `context` tokens before them read again; but the first
    token of the text, or of each document where windows stay within documents, which nothing predicts.
    Example, 7 tokens, block 3, context 2: (0, 1, 4), (2, 4, 7).
    """
    bounds = text.beginnings() if within_documents else np.array([0, len(text)], dtype=np.int64)
    parts = []
    for start, end in itertools.pairwise(bounds):
        first = np.arange(start + 1, end, block, dtype=np.int64)
        parts.append(np.stack([np.maximum(first - context, start), first, np.minimum(first + block, end)], axis=1))
    found = np.concatenate(parts) if parts else np.empty((0, 3), dtype=np.int64)
    found[:, 0] = np.minimum(found[:, 0], found[:, 1] - 1)
    return found


@dataclass(frozen=True)
class Read:
    """A batch of windows as the model read them, padded on the right to S tokens.

    windows int64 [B, 3] (on the host); hidden [B, S, h]; memory [B, S, d]. The state at [b, s] is that of place windows[b, 0] + s + 1.
    """

    windows: Ints
    hidden: Tensor
    memory: Tensor

    def scored(self) -> tuple[Tensor, Tensor, Ints]:
        """hidden [n, h] and memory [n, d] at the scored places of all windows, and those places int64 [n], in order."""
        length = self.hidden.shape[1]
        begin, first, end = (self.windows[:, column, None] for column in range(3))
        places = begin + 1 + np.arange(length)
        chosen = (places >= first) & (places < end)
        mask = torch.from_numpy(chosen).to(self.hidden.device)
        return self.hidden[mask], self.memory[mask], places[chosen]


@torch.no_grad()
def read(reader: CausalReader, text: Text, spans: Ints, *, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Read]:
    """Reads the windows `spans` [W, 3] in order, batch_size at a time. The model is put on the device, in evaluation mode."""
    reader.model.to(device).eval()
    for start in range(0, len(spans), batch_size):
        part = spans[start : start + batch_size]
        length = int((part[:, 2] - 1 - part[:, 0]).max())
        places = np.minimum(part[:, :1] + np.arange(length), len(text) - 1)
        input_ids = torch.from_numpy(text.tokens[places]).to(device)
        hidden, memory = reader.read(input_ids=input_ids)
        yield Read(part, hidden, memory)
