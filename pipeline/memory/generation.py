"""Text that a causal language model writes with its memories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.memory.distribution import Entries, Place, log_distribution
from pipeline.memory.kinds import Memory, Part
from pipeline.memory.mixtures import Values
from pipeline.memory.sampling import Sampling
from pipeline.memory.statistics import Searched
from pipeline.models.causal_reader import CausalReader


@dataclass(frozen=True)
class Setting:
    """What a text is written with. block, context: the window is as long as both together; when it is full, its first `block` tokens leave it
    for long memory, which holds `long_size` entries. store: the external memory; encoder: whose states ask it, where another model's do.
    """

    memory: Memory
    values: Values
    block: int
    context: int
    long_size: int
    store: Searched | None = None
    encoder: CausalReader | None = None


def write(
    reader: CausalReader, prompt: Sequence[int], setting: Setting, sampling: Sampling, *, end: int | None = None, device: torch.device | str = "cpu"
) -> Iterator[int]:
    """The tokens that follow the prompt, one after another, without end or up to the token `end`. A prompt may be longer than the window."""
    assert len(prompt), "nothing to continue"
    draws = np.random.default_rng(sampling.seed)
    text = _Text(reader, setting, list(prompt), device)
    while True:
        token = sampling.draw(log_distribution(setting.memory, text.place(), setting.values), draws)
        yield token
        if token == end:
            return
        text.tokens.append(token)


class _Text:
    """A text as it grows; entries are those of `reading`: the state before a token, and the token."""

    def __init__(self, reader: CausalReader, setting: Setting, tokens: list[int], device: torch.device | str):
        self.reader, self.setting, self.tokens, self.device = reader, setting, tokens, device
        self.begin = 0
        self.left: tuple[Tensor, NDArray[np.int64]] | None = None
        for model in (reader, setting.encoder):
            if model is not None:
                model.model.to(device).eval()

    @torch.no_grad()
    def place(self) -> Place:
        """What the model and its memories say of the next token."""
        self._slide()
        hidden, states = self._read(self.reader, self.tokens[self.begin :])
        query, entries = states[-1], dict[Part, Entries]()
        if "local" in self.setting.memory:
            entries["local"] = self._scores(query, states[:-1]), np.array(self.tokens[self.begin + 1 :], dtype=np.int64)
        if "long" in self.setting.memory:
            keys, values = self.left or (states[:0], np.empty(0, np.int64))
            entries["long"] = self._scores(query, keys), values
        if "external" in self.setting.memory:
            entries["external"] = self._found(query)
        return Place(self.reader.logits(hidden[-1:])[0].float().cpu().numpy(), entries)

    def _slide(self) -> None:
        length = self.setting.block + self.setting.context
        while len(self.tokens) - self.begin > length:
            if "long" in self.setting.memory:
                _, states = self._read(self.reader, self.tokens[self.begin : self.begin + length])
                keys, values = (
                    states[: self.setting.block],
                    np.array(self.tokens[self.begin + 1 : self.begin + 1 + self.setting.block], dtype=np.int64),
                )
                if self.left is not None:
                    keys, values = torch.cat([self.left[0], keys]), np.concatenate([self.left[1], values])
                self.left = keys[-self.setting.long_size :], values[-self.setting.long_size :]
            self.begin += self.setting.block

    def _read(self, reader: CausalReader, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Hidden and memory states [n, .] of n tokens."""
        hidden, states = reader.read(input_ids=torch.tensor([tokens], device=self.device))
        return hidden[0], states[0].float()

    def _scores(self, query: Tensor, keys: Tensor) -> NDArray[np.floating]:
        return (keys @ query / query.shape[0] ** 0.5).cpu().numpy()

    def _found(self, query: Tensor) -> Entries:
        store, encoder = self.setting.store, self.setting.encoder
        assert store is not None
        if encoder is not None:
            query = self._read(encoder, self.tokens[self.begin :])[1][-1]
        scores, values = store.search(query[None].cpu(), int(self.setting.values["neighbours"]))
        return scores[0].numpy(), values[0].numpy()
