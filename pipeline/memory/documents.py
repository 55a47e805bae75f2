"""The documents of a datastore, a line each, so that one can be named and withdrawn."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from pipeline import artifacts
from pipeline.corpus.documents import clean, read
from pipeline.corpus.settings import Source
from pipeline.corpus.store import Store, Writer, token_dtype
from pipeline.corpus.tokenizer import Encoder
from pipeline.errors import UserError

NAME = "documents.jsonl"
PREVIEW = 120
"""Characters of a document's beginning that are kept, to know it by."""
KEYS = "keys.json"
_PREVIEW_TOKENS = 60
_BATCH = 256


@dataclass(frozen=True)
class Entry:
    """number: its own for good. key: where it came from. first, count: its entries. sha256: of its tokens. preview: how it begins."""

    number: int
    key: str
    first: int
    count: int
    sha256: str
    preview: str


def entries_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Entries that documents of so many tokens give: nothing predicts the first token."""
    return np.maximum(lengths - 1, 0)


def describe(
    store: Store, chosen: NDArray[np.int64], keys: Sequence[str], tokenizer: PreTrainedTokenizerFast, number: int, first: int
) -> Iterator[Entry]:
    """Table lines of a store's documents `chosen`, in order. number, first: of the first of them and of its first entry. keys: of all documents."""
    for place, document in enumerate(chosen):
        tokens = store.read(int(document)).astype(np.int64)
        count = int(entries_of(np.array(len(tokens))))
        preview = " ".join(str(tokenizer.decode(tokens[:_PREVIEW_TOKENS], skip_special_tokens=True)).split())[:PREVIEW]
        yield Entry(number + place, keys[document], first, count, digest(tokens), preview)
        first += count


def digest(tokens: NDArray[np.int64]) -> str:
    """sha256 of a document's tokens, its end token included."""
    return hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()


def write(path: Path, entries: Iterable[Entry]) -> None:
    """The whole table, by one rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        for entry in entries:
            file.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    artifacts.sync(path.parent)


def table(path: Path) -> Iterator[Entry]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield Entry(**json.loads(line))


def search(path: Path, text: str) -> Iterator[Entry]:
    """Documents whose preview, or where they came from, holds a text; case does not count."""
    wanted = " ".join(text.split()).casefold()
    return (entry for entry in table(path) if wanted in entry.preview.casefold() or wanted in entry.key.casefold())


def encode(sources: Iterable[Source], tokenizer: Path, directory: Path) -> tuple[Store, list[str]]:
    """A token store of the sources' documents, cleaned, with the tokenizer of that directory; and where each came from.

    A store that is whole is taken as it is. Raises UserError when the sources hold no text.
    """
    listed = directory / KEYS
    if not listed.is_file():
        encoder = Encoder(tokenizer)
        directory.mkdir(parents=True, exist_ok=True)
        keys: list[str] = []
        with Writer(directory / "00000", token_dtype(encoder.vocab_size)) as writer:
            for texts, names in _batches(sources):
                for ids in encoder.encode(texts):
                    writer.add(ids)
                keys += names
        artifacts.write_json(listed, keys)
    keys = json.loads(listed.read_text())
    if not keys:
        named = ", ".join(source.path or source.hub or "embedded" for source in sources)
        raise UserError(f"{named}: no text in it; give documents to index")
    return Store.open(directory), keys


def _batches(sources: Iterable[Source]) -> Iterator[tuple[list[str], list[str]]]:
    texts: list[str] = []
    names: list[str] = []
    for source in sources:
        for document in read(source):
            if text := clean(document.text):
                texts.append(text)
                names.append(document.key)
            if len(texts) == _BATCH:
                yield texts, names
                texts, names = [], []
    if texts:
        yield texts, names
