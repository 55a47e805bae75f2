"""A datastore from a token store: every rank makes whole shards, which a later attempt finds done.

What is made depends on the documents, the model and the settings, not on how many ranks make it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.store import Store
from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.memory import description, documents, quantiser, reading, shards
from pipeline.memory.description import Description
from pipeline.memory.settings import IndexSettings
from pipeline.memory.shards import Shards
from pipeline.models.causal_reader import CausalReader

Ints = NDArray[np.int64]
FLAT = 100_000
"""Fewer keys than this are searched one by one, where `kind` is auto."""


@dataclass(frozen=True)
class Window:
    block: int
    context: int
    batch_size: int


def choose(lengths: Ints, max_keys: int | None) -> Ints:
    """int64, rising: the documents to index, all or evenly spaced ones with no more than max_keys entries. lengths: tokens of each."""
    entries = documents.entries_of(lengths)
    there = np.flatnonzero(entries)
    total = int(entries.sum())
    if max_keys is None or total <= max_keys:
        return there
    count = len(there) * max_keys // total
    while count and entries[_spaced(there, count)].sum() > max_keys:
        count -= 1
    if not count:
        raise UserError(f"index.max_keys {max_keys} is less than the first document gives ({entries[there[0]]} keys); raise it")
    return _spaced(there, count)


def _spaced(numbers: Ints, count: int) -> Ints:
    return numbers[np.arange(count) * len(numbers) // count]


def cut(entries: Ints, shard_keys: int) -> list[slice]:
    """Runs of documents that make a shard each: as many as have no more than shard_keys entries together, at least one."""
    runs, first, held = [], 0, 0
    for place, count in enumerate(entries):
        if held and held + count > shard_keys:
            runs.append(slice(first, place))
            first, held = place, 0
        held += int(count)
    return [*runs, slice(first, len(entries))] if len(entries) else runs


def write_keys(
    directory: Path,
    store: Store,
    chosen: Ints,
    reader: CausalReader,
    window: Window,
    shard_keys: int,
    ranks: Ranks,
    device: torch.device | str = "cpu",
    before: int = 0,
) -> list[int]:
    """This rank's share of the shards of those documents, without the shards that are there. Returns the entries of every shard.

    before: shards that the datastore has already; new ones are numbered from there.
    """
    entries = documents.entries_of(store.lengths[chosen])
    runs = cut(entries, shard_keys)
    for number, run in list(enumerate(runs))[ranks.rank :: ranks.size]:
        place = description.shard(directory, before + number)
        if place.is_dir():
            continue
        text = reading.Text.of(store, chosen[run])
        spans = reading.windows(text, window.block, window.context, within_documents=True)
        keys = np.empty((int(entries[run].sum()), reader.width), dtype=np.float16)
        at, places = 0, np.empty(len(keys), dtype=np.int64)
        for batch in reading.read(reader, text, spans, batch_size=window.batch_size, device=device):
            _, states, where = batch.scored()
            keys[at : at + len(where)] = _halved(states)
            places[at : at + len(where)] = where
            at += len(where)
        assert at == len(keys)
        shards.write(place, keys, text.tokens[places].astype(np.int32))
        print(f"index: shard {number + 1} of {len(runs)} has its {len(keys):,} keys", flush=True)
    return [int(entries[run].sum()) for run in runs]


def _halved(states: torch.Tensor) -> NDArray[np.float16]:
    half = states.to(torch.float16)
    if not torch.isfinite(half).all():
        raise UserError("the model's memory states are beyond fp16 (65,504), which keys are kept in; name another model.memory_module")
    return half.cpu().numpy()


def write_parts(directory: Path, about: Description, quantised_by: Path, ranks: Ranks, before: int = 0) -> None:
    """This rank's share of the shards' inverted lists, then without their keys where those are not kept. Done ones are passed over.

    quantised_by: directory with the trained quantiser; before: shards whose parts are there.
    """
    counts = about["shards"]
    starts = np.append(0, np.cumsum(counts)).astype(np.int64)
    for number in list(range(before, len(counts)))[ranks.rank :: ranks.size]:
        place = description.shard(directory, number)
        if about["kind"] == "ivfpq" and not (place / "part.faiss").is_file():
            whole = Shards([np.load(place / "keys.npy", mmap_mode="r")], [np.load(place / "values.npy")], starts[number : number + 2])
            quantiser.write_part(place / "part.faiss", quantised_by, whole.blocks())
        if not about["keep_keys"]:
            (place / "keys.npy").unlink(missing_ok=True)


def build(
    directory: Path,
    store: Store,
    keys: Sequence[str],
    reader: CausalReader,
    settings: IndexSettings,
    window: Window,
    *,
    model: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_directory: Path,
    tokenizer_fingerprint: str,
    seed: int,
    ranks: Ranks,
    device: torch.device | str = "cpu",
) -> Description | None:
    """Make the datastore of a store's documents; the first rank returns its description.

    keys: where each document of the store came from. model: what the description says of the model that `reader` reads.
    """
    chosen = choose(store.lengths, settings.max_keys)
    if not len(chosen):
        raise UserError("index: no document has two tokens, so there is nothing to index; give other sources")
    counts = write_keys(directory, store, chosen, reader, window, settings.shard_keys, ranks, device)
    kind = settings.kind if settings.kind != "auto" else "flat" if sum(counts) < FLAT else "ivfpq"
    about: Description = {
        "format": description.FORMAT,
        "key": "input of the last feed-forward block, float16",
        "metric": settings.metric,
        "kind": kind,
        "dimensions": reader.width,
        "keep_keys": settings.keep_keys or kind == "flat",
        "window": {"block": window.block, "context": window.context},
        "batch_size": window.batch_size,
        "shard_keys": settings.shard_keys,
        "model": model,
        "tokenizer": tokenizer_fingerprint,
        "shards": counts,
        "entries": sum(counts),
        "documents": len(chosen),
        "next_document": len(chosen),
    }
    ranks.barrier()
    if ranks.first and kind == "ivfpq" and not (directory / "quantiser.faiss").is_file():
        _train(directory, about, settings, seed)
    ranks.barrier()
    write_parts(directory, about, directory, ranks)
    ranks.barrier()
    if not ranks.first:
        return None
    if not (directory / documents.NAME).is_file():
        documents.write(directory / documents.NAME, documents.describe(store, chosen, keys, tokenizer, number=0, first=0))
    shutil.copytree(tokenizer_directory, directory / "tokenizer", dirs_exist_ok=True)
    return description.write(directory, about)


def _train(directory: Path, about: Description, settings: IndexSettings, seed: int) -> None:
    sample = quantiser.sample(settings, about["entries"], seed)
    keys = Shards.open(directory, {**about, "keep_keys": True}).sample(sample)
    print(f"index: training the quantiser on {len(sample):,} keys", flush=True)
    quantiser.train(directory, keys, about["entries"], settings, seed)
