"""A causal language model tested with each of its memories: values tuned on some held-out documents, losses measured on the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.store import Store
from pipeline.errors import UserError
from pipeline.evaluation.settings import EvaluateSettings
from pipeline.memory.kinds import Memory, Part
from pipeline.memory.long_term import LongTerm
from pipeline.memory.mixtures import PARAMETERS, Parameter, Values, parameters, predict, temperatures
from pipeline.memory.reading import Ints, Text
from pipeline.memory.statistics import Measurement, Searched, Statistics, measure
from pipeline.memory.tuning import Tuned, tune
from pipeline.models.causal_reader import CausalReader

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Result:
    """What a memory does for the model on the test documents.

    losses float64 [n]: of each scored place, in nats. share: mean share of the probability that the memory has. values: as tuned or given.
    development_loss: mean on the documents they were tuned on, where they were. seconds: the model's, and the memory's own besides.
    """

    memory: str
    losses: NDArray[np.float64]
    share: float
    values: dict[str, float]
    development_loss: float | None
    warnings: list[str]
    seconds: float

    @property
    def loss(self) -> float:
        return float(self.losses.mean())


@dataclass(frozen=True)
class Tested:
    """results, one a memory. Of the test text: places int64 [n] that are scored, and the words, characters and UTF-8 bytes they spell.
    development: documents that values were tuned on, where any were."""

    results: list[Result]
    text: Text
    places: Ints
    words: int
    characters: int
    bytes: int
    measurement: Measurement
    development: int

    def report(self) -> dict[str, Any]:
        """What was done and the figures of each memory, in plain values."""
        how, long = self.measurement, self.measurement.long
        return {
            "tokens": len(self.places),
            "words": self.words,
            "characters": self.characters,
            "bytes": self.bytes,
            "documents": len(self.text.beginnings()) - 1,
            "development_documents": self.development,
            "window": {"block": how.block, "context": how.context},
            "within_documents": how.within_documents,
            "long": {"size": long.size, "reset": long.reset, "keep_duplicates": long.keep_duplicates},
            "skip_confident": how.skip_confident,
            "rows": [self._row(result) for result in self.results],
        }

    def _row(self, result: Result) -> dict[str, Any]:
        nats = float(result.losses.sum())
        return {
            "memory": result.memory,
            "loss": result.loss,
            "perplexity": math.exp(result.loss),
            "word_perplexity": _exp(nats / max(self.words, 1)),
            "bits_per_byte": nats / math.log(2) / max(self.bytes, 1),
            "bits_per_character": nats / math.log(2) / max(self.characters, 1),
            "share": result.share,
            "values": result.values,
            "development_loss": result.development_loss,
            "warnings": result.warnings,
            "seconds": result.seconds,
            "tokens_per_second": len(result.losses) / max(result.seconds, 1e-9),
        }


def _exp(nats: float) -> float | None:
    """None beyond what a number holds, which JSON could not say."""
    return math.exp(nats) if nats < 700 else None


def evaluate(
    reader: CausalReader,
    held_out: Store,
    tokenizer: PreTrainedTokenizerFast,
    settings: EvaluateSettings,
    *,
    row_length: int | None,
    within_documents: bool,
    store: Searched | None = None,
    encoder: CausalReader | None = None,
    device: torch.device | str = "cpu",
    scratch: Path | None = None,
    identity: str = "",
) -> Tested:
    """Each memory of the settings on the same test documents, with values tuned once on the development documents.

    row_length: tokens of a row in training, which default windows are made of. within_documents: where the settings leave it open.
    store, encoder, scratch, identity: as in `statistics.measure`.
    Raises UserError when there are too few held-out documents.
    """
    split = documents(held_out.lengths, settings)
    development, tested = (Text.of(held_out, numbers, settings.max_document_tokens) for numbers in split)
    block, context = settings.windowed(row_length)
    how = Measurement(
        block,
        context,
        within_documents if settings.within_documents is None else settings.within_documents,
        temperatures={},
        long=LongTerm(settings.long.size, settings.long.reset, settings.long.keep_duplicates),
        skip_confident=settings.external.skip_confident,
        batch_size=settings.batch_size,
    )
    measured = partial(measure, reader, store=store, encoder=encoder, device=device, directory=scratch, identity=identity)
    memories = _with_interpolation(settings.memories)
    grids = {memory.name: _grids(memory, settings) for memory in memories}
    tune_now = len(development) > 0 and any(map(_open, grids.values()))
    tuned = _tuned(memories, grids, measured(development, _for(how, memories, grids))) if tune_now else _untuned(memories, grids)
    chosen = {name: {key: Parameter((value,), value) for key, value in found.values.items()} for name, found in tuned.items()}
    statistics = measured(tested, _for(how, memories, chosen))
    results = [_result(memory, statistics, tuned[memory.name]) for memory in memories]
    spelled = _spelled(tested, statistics.places, tokenizer)
    return Tested(results, tested, statistics.places, *spelled, statistics.measurement, len(split[0]) if tune_now else 0)


def documents(lengths: Ints, settings: EvaluateSettings) -> tuple[Ints, Ints]:
    """Numbers of the development and of the test documents, rising; a pure function of document lengths and settings.

    Raises UserError when either would be empty.
    """
    capped = lengths if settings.max_document_tokens is None else np.minimum(lengths, settings.max_document_tokens)
    usable = np.flatnonzero(capped > 1)
    if settings.max_tokens is not None:
        spread = usable[np.argsort((np.arange(len(usable)) * GOLDEN) % 1, kind="stable")]
        count = int(np.searchsorted(np.cumsum(capped[spread]), settings.max_tokens, side="right"))
        usable = np.sort(spread[: max(count, 1 if settings.development == 0 else 2)])
    ranks = np.arange(len(usable))
    development = np.floor((ranks + 1) * settings.development) > np.floor(ranks * settings.development)
    if settings.development and len(usable) and not development.any():
        development[0] = True
    if development.all() or not len(usable):
        raise UserError(
            f"evaluate.memory: {len(usable)} held-out documents of two tokens or more, too few for a development and a test split;"
            " hold out more (tokenize.validation), or give the values in evaluate.fixed and set evaluate.development: 0"
        )
    return usable[development], usable[~development]


def _with_interpolation(memories: Sequence[Memory]) -> list[Memory]:
    """Each memory, a joint one with a store followed by its interpolated form."""
    found = []
    for memory in memories:
        found.append(memory)
        if memory.rule == "joint" and "external" in memory:
            found.append(memory.interpolated())
    return found


def _grids(memory: Memory, settings: EvaluateSettings) -> dict[str, Parameter]:
    k = tuple(settings.external.k)
    fixed = settings.fixed.given()
    known = {**PARAMETERS, "neighbours": Parameter(k, k[-1], (k[-1],))}
    return {name: Parameter((fixed[name],), fixed[name]) if name in fixed else known[name] for name in parameters(memory)}


def _open(grid: Mapping[str, Parameter]) -> list[str]:
    return [name for name, parameter in grid.items() if len(parameter.grid) > 1]


def _tuned(memories: Sequence[Memory], grids: Mapping[str, Mapping[str, Parameter]], statistics: Statistics) -> dict[str, Tuned]:
    found: dict[str, Tuned] = {}
    for memory in memories:
        taken = _taken(memory, found)
        best = tune(partial(_mean_loss, memory, statistics, taken), grids[memory.name])
        found[memory.name] = replace(best, values=taken | best.values)
    return found


def _untuned(memories: Sequence[Memory], grids: Mapping[str, Mapping[str, Parameter]]) -> dict[str, Tuned]:
    found: dict[str, Tuned] = {}
    for memory in memories:
        grid = grids[memory.name]
        warnings = [f"{', '.join(_open(grid))}: not tuned, since evaluate.development is 0"] if _open(grid) else []
        found[memory.name] = Tuned(_taken(memory, found) | {name: parameter.start for name, parameter in grid.items()}, None, warnings)
    return found


def _taken(memory: Memory, known: Mapping[str, Tuned]) -> dict[str, float]:
    """The values that an interpolated memory takes over from its joint form."""
    return known[memory.joint].values if memory.rule == "interpolated" else {}


def _mean_loss(memory: Memory, statistics: Statistics, taken: Values, values: Values) -> float:
    return -float(predict(memory, statistics, {**taken, **values}).log_probability.mean())


def _for(how: Measurement, memories: Sequence[Memory], grids: Mapping[str, Mapping[str, Parameter]]) -> Measurement:
    """The measurement that has every temperature and k of these grids."""
    needed: dict[Part, set[float]] = {}
    neighbours: set[int] = set()
    for memory in memories:
        for part, names in temperatures(memory).items():
            values = (value for name in names if name in grids[memory.name] for value in grids[memory.name][name].grid)
            needed.setdefault(part, set()).update(values)
        if "neighbours" in grids[memory.name]:
            neighbours |= {int(k) for k in grids[memory.name]["neighbours"].grid}
    return replace(how, temperatures={part: tuple(sorted(found)) for part, found in needed.items()}, neighbours=tuple(sorted(neighbours)))


def _result(memory: Memory, statistics: Statistics, tuned: Tuned) -> Result:
    prediction = predict(memory, statistics, tuned.values)
    seconds = sum(statistics.seconds.get(part, 0.0) for part in ("model", *memory.parts))
    losses = -prediction.log_probability.astype(np.float64)
    return Result(memory.name, losses, float(prediction.share.mean()), tuned.values, tuned.loss, tuned.warnings, seconds)


def _spelled(text: Text, places: Ints, tokenizer: PreTrainedTokenizerFast) -> tuple[int, int, int]:
    """Words (between white space), characters and UTF-8 bytes of the scored tokens, decoded a document at a time without special tokens."""
    words = characters = size = 0
    bounds = text.beginnings()
    for start, end in itertools.pairwise(bounds):
        scored = places[np.searchsorted(places, start) : np.searchsorted(places, end)]
        decoded = str(tokenizer.decode(text.tokens[scored].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        words, characters, size = words + len(decoded.split()), characters + len(decoded), size + len(decoded.encode("utf-8", "replace"))
    return words, characters, size
