"""Documents added to a datastore, or withdrawn from it.

A change is prepared aside, then written down whole (`change.json`), then carried out in steps that may be repeated. So a change that
is cut off either never was, or is completed by whoever opens the datastore next. One process changes a datastore at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pipeline import artifacts
from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.documents import clean
from pipeline.corpus.settings import Source
from pipeline.corpus.tokenizer import Encoder
from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.memory import building, description, documents, quantiser
from pipeline.memory.description import INTENT, Description
from pipeline.memory.documents import Entry
from pipeline.memory.shards import Shards
from pipeline.models import build, identity
from pipeline.models.causal_reader import CausalReader

ADDING = "adding"
"""Where shards are made that are not part of the datastore yet."""


def add(
    directory: str | Path,
    sources: Sequence[Source],
    *,
    model: str | Path | None = None,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
) -> list[Entry]:
    """Read further documents with the model that made the keys, and index them; those that are there already are passed over.

    model: where that model lies now; default: where it lay. Returns the new documents.
    Raises UserError when that is another model, the sources hold no text, or another process changes the datastore.
    """
    place = description.locate(directory)
    with _alone(place):
        about, aside = description.read(place), place / ADDING
        description.check_sizes(place, about)
        reader = _reader(place, about, model, trust_remote_code)
        try:
            store, keys = documents.encode(sources, place / "tokenizer", aside / "text")
            known = {entry.sha256 for entry in documents.table(place / documents.NAME)}
            new = building.choose(store.lengths, None)
            new = new[[documents.digest(store.read(int(document)).astype("int64")) not in known for document in new]] if len(new) else new
            if not len(new):
                return []
            window = building.Window(about["window"]["block"], about["window"]["context"], about["batch_size"])
            before, ranks = len(about["shards"]), Ranks()
            counts = building.write_keys(aside, store, new, reader, window, about["shard_keys"], ranks, device, before)
            after = {**about, "shards": [*about["shards"], *counts]}
            building.write_parts(aside, after, place, ranks, before)
            tokenizer = tokenizers.load(place / "tokenizer")
            described = documents.describe(store, new, keys, tokenizer, number=about["next_document"], first=sum(about["shards"]))
            documents.write(aside / documents.NAME, described)
            found = list(documents.table(aside / documents.NAME))
            after["entries"] += sum(counts)
            after["documents"] += len(found)
            after["next_document"] += len(found)
            _commit(place, after, removed=[])
            return found
        finally:
            if not (place / INTENT).is_file():
                shutil.rmtree(aside, ignore_errors=True)


def remove(directory: str | Path, numbers: Iterable[int] = (), texts: Sequence[Path] = ()) -> list[Entry]:
    """Withdraw documents, by their numbers or by files that hold their text; returns what was withdrawn.

    Their keys and values are overwritten where they lie, their codes and lines rewritten without them. Copies of a text go together.
    Raises UserError when there is no such document, or another process changes the datastore.
    """
    place = description.locate(directory)
    with _alone(place):
        about = description.read(place)
        description.check_sizes(place, about)
        wanted, digests = set(numbers), {_digest(place, path): path for path in texts}
        found = [entry for entry in documents.table(place / documents.NAME) if entry.number in wanted or entry.sha256 in digests]
        lacking = [f"number {number}" for number in sorted(wanted - {entry.number for entry in found})]
        lacking += [f"the text of {path}" for digest, path in digests.items() if digest not in {entry.sha256 for entry in found}]
        if lacking:
            raise UserError(
                f"{place}: has no document of {', '.join(lacking)}; nothing was removed. Look with trimline datastore info {place} --find TEXT"
            )
        if found:
            after = {**about, "entries": about["entries"] - sum(entry.count for entry in found), "documents": about["documents"] - len(found)}
            _commit(place, after, removed=[[entry.number, entry.first, entry.count] for entry in found])
        return found


def complete(directory: Path) -> None:
    """Carry out a change that was written down, where there is one; waits for a process that is at it."""
    try:
        with open(directory / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (directory / INTENT).is_file():
                _apply(directory)
    except PermissionError as error:
        raise UserError(
            f"{directory}: a change was cut off here and must be completed by who may write: trimline datastore info {directory}"
        ) from error


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """While inside, no other process changes the datastore; a change that was cut off is completed first."""
    try:
        lock = open(directory / ".lock", "w")  # noqa: SIM115 closed below
    except PermissionError as error:
        raise UserError(f"{directory}: cannot be written (permission denied)") from error
    with lock, artifacts.disk_full_told():
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process is changing this datastore; wait for it, or end it and run again") from None
        if (directory / INTENT).is_file():
            _apply(directory)
        shutil.rmtree(directory / ADDING, ignore_errors=True)
        yield


def _reader(place: Path, about: Description, model: str | Path | None, trust_remote_code: bool) -> CausalReader:
    made_with = about["model"]
    path = Path(model or made_with["path"])
    if not path.is_dir():
        raise UserError(f"{path}: the model that made {place} is not there; say where it is with --model DIR")
    found = identity.fingerprint(path)
    if found != made_with["fingerprint"]:
        raise UserError(
            f"{path}: is model {found[:8]}, the keys of {place} were made with {made_with['fingerprint'][:8]}; "
            "give that model with --model DIR, or index all documents with this one"
        )
    return CausalReader(build.load(path, head="causal", trust_remote_code=trust_remote_code), made_with["memory_module"])


def _digest(place: Path, path: Path) -> str:
    try:
        text = clean(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); give a file that holds the document's text") from None
    return documents.digest(next(iter(Encoder(place / "tokenizer").encode([text]))))


def _commit(directory: Path, after: Description, removed: list[list[int]]) -> None:
    artifacts.write_json(directory / INTENT, {"after": after, "removed": removed})
    artifacts.sync(directory)
    _apply(directory)


def _apply(directory: Path) -> None:
    """Carry out the change that is written down. Every step may be repeated, whichever were done before."""
    intent = json.loads((directory / INTENT).read_text(encoding="utf-8"))
    after, removed = intent["after"], [tuple(row) for row in intent["removed"]]
    _move_in(directory, after)
    touched = _erase(directory, after, [(first, count) for _, first, count in removed])
    _rewrite_table(directory, {number for number, _, _ in removed})
    changed = {description.shard(directory, number).relative_to(directory).as_posix() for number in touched}
    known = description.read(directory)["files"]
    same = {name: entry for name, entry in known.items() if name != documents.NAME and name.rpartition("/")[0] not in changed}
    written = description.write(directory, after, same)
    if (directory.parent / artifacts.MANIFEST).is_file():
        artifacts.revise(directory.parent, directory.name, {**written["files"], description.NAME: None})
    (directory / INTENT).unlink()
    artifacts.sync(directory)
    shutil.rmtree(directory / ADDING, ignore_errors=True)


def _move_in(directory: Path, after: Description) -> None:
    for number in range(len(after["shards"])):
        made = description.shard(directory / ADDING, number)
        if made.is_dir():
            os.rename(made, description.shard(directory, number))
    artifacts.sync(directory / "shards")


def _erase(directory: Path, after: Description, ranges: list[tuple[int, int]]) -> set[int]:
    """The numbers of the shards that had any of those entries."""
    shards = Shards.open(directory, after, writable=True)
    touched = {number for first, count in ranges for number in shards.erase(first, count)}
    for number in touched:
        part = description.shard(directory, number) / "part.faiss"
        if part.is_file():
            quantiser.remove(part, ranges)
    return touched


def _rewrite_table(directory: Path, removed: set[int]) -> None:
    path, more = directory / documents.NAME, directory / ADDING / documents.NAME
    there: list[Any] = [entry.number for entry in documents.table(path)]
    last = max(there, default=-1)
    new = (entry for entry in documents.table(more) if entry.number > last) if more.is_file() else iter(())
    documents.write(path, (entry for entry in chain(documents.table(path), new) if entry.number not in removed))
