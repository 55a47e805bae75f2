"""What each memory says of each scored place: all that mixtures and their tuning need of a model and a text."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.memory import pieces, sums
from pipeline.memory.kinds import Part
from pipeline.memory.long_term import Held, LongTerm
from pipeline.memory.mixtures import Pair
from pipeline.memory.reading import Ints, Read, Text, read, windows
from pipeline.models.causal_reader import CausalReader

CHUNK = 256
"""Rows of vocabulary scores held at a time."""

PIECE = 1 << 15
"""Places, about, that are measured and kept together: what is lost when a measurement is cut off."""


class Searched(Protocol):
    """What an external memory is asked (`Datastore`): queries fp32 [n, d] -> scores fp32 [n, k], falling, and values int64 [n, k]."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Measurement:
    """How a text is read, and what is measured of it.

    block, context: tokens scored in a window, and tokens before them that are read again. temperatures: of each part that is measured.
    neighbours: each k, rising, of the external part. skip_confident: the model's largest probability from which that is not searched.
    """

    block: int
    context: int
    within_documents: bool
    temperatures: Mapping[Part, tuple[float, ...]]
    long: LongTerm
    neighbours: tuple[int, ...] = ()
    skip_confident: float | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Statistics:
    """Evidence (`mixtures.Evidence`) about a text, a few numbers a place: 8 + 8 T bytes for a part of T temperatures, K times that for the store.

    places int64 [n]; partition, target fp32 [n]: the vocabulary's log sum exp and the target's score; pairs: of local and long fp32 [2, n, T],
    of external [2, n, K, T]; seconds: taken by the model (to the vocabulary's scores) and by each part besides.
    """

    measurement: Measurement
    places: Ints
    partition: NDArray[np.float32]
    target: NDArray[np.float32]
    pairs: Mapping[Part, NDArray[np.float32]]
    seconds: dict[str, float]

    def pair(self, part: Part, temperature: float, neighbours: int | None = None) -> Pair:
        at = self.measurement.temperatures[part].index(temperature)
        if part == "external":
            assert neighbours is not None
            of_all, of_target = self.pairs[part][:, :, self.measurement.neighbours.index(neighbours), at]
        else:
            of_all, of_target = self.pairs[part][:, :, at]
        return of_all.astype(np.float64), of_target.astype(np.float64)


def measure(
    reader: CausalReader,
    text: Text,
    how: Measurement,
    *,
    store: Searched | None = None,
    encoder: CausalReader | None = None,
    device: torch.device | str = "cpu",
    directory: Path | None = None,
    identity: str = "",
) -> Statistics:
    """Reads the text once and sums each memory at each scored place.

    Memory beyond the result: one batch of windows, the keys of long.size + a batch of places, and `sums.ROWS` x `sums.ENTRIES` scores.
    store: searched once for each scored place; encoder: whose states its queries are, where that is another model.
    directory: where finished pieces are kept, so that a measurement that was cut off goes on; identity: what the model and the store are.
    """
    spans = windows(text, how.block, how.context, within_documents=how.within_documents)
    measuring = _Measuring(reader, text, spans, how, store, encoder, torch.device(device))
    per_piece = max(PIECE // how.block // how.batch_size, 1) * how.batch_size
    key = pieces.key(how, identity, text.tokens, text.document)
    found = [
        pieces.kept(directory, f"{key}-{start:09}", partial(measuring.piece, start, min(start + per_piece, len(spans))))
        for start in range(0, len(spans), per_piece)
    ]
    return _joined(how, found)


class _Measuring:
    def __init__(
        self,
        reader: CausalReader,
        text: Text,
        spans: Ints,
        how: Measurement,
        store: Searched | None,
        encoder: CausalReader | None,
        device: torch.device,
    ) -> None:
        self.reader, self.text, self.spans, self.how, self.device = reader, text, spans, how, device
        self.store, self.encoder = store, encoder
        counts = spans[:, 2] - spans[:, 1]
        self.numbers = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])  # of each window's first entry
        self.places = np.repeat(spans[:, 1] - self.numbers[:-1], counts) + np.arange(self.numbers[-1])
        self.low, self.high = how.long.ranges(text, spans, self.places)
        self.held = Held(0)
        self.seconds: dict[str, float] = defaultdict(float)

    def piece(self, start: int, end: int) -> dict[str, NDArray]:
        """The statistics of the windows start .. end - 1, as arrays by name."""
        self.seconds.clear()
        if "long" in self.how.temperatures:
            self._remember(start)
        batches = [self._batch(*batch) for batch in self._read(start, end)]
        arrays = {name: torch.cat([batch[name] for batch in batches], dim=1).numpy() for name in batches[0]}
        return (
            arrays | {"places": self.places[self.numbers[start] : self.numbers[end]]} | {f"seconds {k}": np.array(v) for k, v in self.seconds.items()}
        )

    def _read(self, start: int, end: int) -> Iterator[tuple[Read, Tensor | None]]:
        """Batches of windows, and the queries of their scored places where these are another model's."""
        spans, batch_size = self.spans[start:end], self.how.batch_size
        reads = read(self.reader, self.text, spans, batch_size=batch_size, device=self.device)
        others = iter(()) if self.encoder is None else read(self.encoder, self.text, spans, batch_size=batch_size, device=self.device)
        while True:
            with self._timed("model"):
                batch = next(reads, None)
            if batch is None:
                return
            with self._timed("external"):
                other = next(others, None)
            yield batch, None if other is None else other.scored()[1]

    @torch.no_grad()
    def _batch(self, batch: Read, queries: Tensor | None) -> dict[str, Tensor]:
        """Of a batch with n scored places: `vocabulary` [2, n], and the pairs of each part [2, n, ...]; on the host."""
        parts = self.how.temperatures
        with self._timed("model"):
            hidden, states, places = batch.scored()
            targets = torch.from_numpy(self.text.tokens[places]).to(self.device)
            partition, target, confident = self._vocabulary(hidden, targets)
        found = {"vocabulary": torch.stack([partition, target]).cpu()}
        if "local" in parts:
            with self._timed("local"):
                found["local"] = self._local(batch, parts["local"]).cpu()
        if "long" in parts:
            with self._timed("long"):
                found["long"] = self._long(states, targets, parts["long"]).cpu()
        if "external" in parts:
            with self._timed("external"):
                found["external"] = self._external(states if queries is None else queries, targets, confident, parts["external"])
        return found

    def _vocabulary(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log partition and target score [n]; and where the model is confident, [n], if that is asked."""
        if self.how.skip_confident is None or "external" not in self.how.temperatures:
            return (*self.reader.scores(hidden, targets, CHUNK), None)
        columns = []
        for some, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = self.reader.logits(some).float()
            columns.append(torch.stack([logits.logsumexp(1), logits.gather(1, wanted[:, None]).squeeze(1), logits.amax(1)]))
        partition, target, largest = torch.cat(columns, dim=1)
        return partition, target, (largest - partition).exp() >= self.how.skip_confident

    def _local(self, batch: Read, temperatures: Sequence[float]) -> Tensor:
        begin, first, end = (batch.windows[:, column, None] for column in range(3))
        skipped = int((first - begin).min()) - 1  # rows of context that no window of the batch scores
        keys, length = batch.memory, batch.memory.shape[1]
        places = begin + 1 + np.arange(length)
        values = torch.from_numpy(self.text.tokens[np.minimum(places, len(self.text) - 1)]).to(self.device)
        high = torch.arange(skipped, length, device=self.device).expand(len(keys), -1)
        found = sums.over_range(keys[:, skipped:], keys, values, values[:, skipped:], torch.zeros_like(high), high, temperatures)
        chosen = (places >= first) & (places < end)
        return found[:, torch.from_numpy(chosen[:, skipped:]).to(self.device)]

    def _long(self, states: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Tensor:
        begin = self.held.end
        self.held.extend(states, targets)
        self.held.forget(int(self.low[begin]))
        keys, values = self.held.entries()
        rows = slice(begin, begin + len(states))
        low, high = (torch.from_numpy(bound[rows] - self.held.start).to(self.device)[None] for bound in (self.low, self.high))
        return sums.over_range(states[None], keys[None], values[None], targets[None], low, high, temperatures)[:, 0]

    def _external(self, queries: Tensor, targets: Tensor, confident: Tensor | None, temperatures: Sequence[float]) -> Tensor:
        assert self.store is not None
        neighbours = self.how.neighbours
        found = torch.full((2, len(queries), len(neighbours), len(temperatures)), -torch.inf)
        asked = torch.arange(len(queries)) if confident is None else torch.nonzero(~confident.cpu())[:, 0]
        if len(asked):
            scores, values = self.store.search(queries.float().cpu()[asked], neighbours[-1])
            near = (scores.to(self.device), values.to(self.device), targets[asked.to(self.device)])
            found[:, asked] = sums.over_nearest(*near, neighbours, temperatures).cpu()
        return found

    def _remember(self, start: int) -> None:
        """Holds what long memory has before the window `start`, read again unless the piece before was just measured."""
        number = int(self.numbers[start])
        if self.held.end == number or not len(self.places):
            return
        window = int(np.searchsorted(self.numbers, self.low[number], side="right")) - 1
        window -= window % self.how.batch_size  # in the same batches as before, for the same bits
        self.held = Held(int(self.numbers[window]))
        for batch in read(self.reader, self.text, self.spans[window:start], batch_size=self.how.batch_size, device=self.device):
            _, states, places = batch.scored()
            self.held.extend(states, torch.from_numpy(self.text.tokens[places]).to(self.device))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] += time.perf_counter() - begun


def _joined(how: Measurement, found: Sequence[Mapping[str, NDArray]]) -> Statistics:
    def whole(name: str, axis: int = 1) -> NDArray:
        return np.concatenate([piece[name] for piece in found], axis=axis)

    if not found:
        nothing = np.empty(0, np.float32)
        empty = {
            part: np.empty((2, 0, *((len(how.neighbours),) if part == "external" else ()), len(t)), np.float32)
            for part, t in how.temperatures.items()
        }
        return Statistics(how, np.empty(0, np.int64), nothing, nothing, empty, {})
    partition, target = whole("vocabulary")
    names = sorted(set(itertools.chain.from_iterable(found)))
    seconds = {name.removeprefix("seconds "): float(sum(piece[name] for piece in found)) for name in names if name.startswith("seconds ")}
    return Statistics(how, whole("places", 0), partition, target, {part: whole(part) for part in how.temperatures}, seconds)
