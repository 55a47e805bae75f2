"""Cleaned documents on disk, in shards of text: what lies between reading a corpus and encoding it.

`<split>/00000.jsonl` holds a JSON string a line. `spool.json`, written last, says that all are there and what they hold. The shards
depend on the sources and settings alone, never on ranks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pipeline import artifacts
from pipeline.corpus import documents
from pipeline.corpus.documents import Document
from pipeline.corpus.duplicates import Duplicates
from pipeline.corpus.settings import Source, TokenizeSettings
from pipeline.errors import UserError

_REPORT_SECONDS = 5


@dataclass
class Counts:
    """What went into a spool. text_bytes: UTF-8 bytes by split; documents by split; those dropped, by why."""

    documents: dict[str, int]
    text_bytes: dict[str, int]
    duplicates: int = 0
    short: int = 0
    held_out: int = 0


def write(settings: TokenizeSettings, directory: Path) -> Counts:
    """Read, clean, drop near-duplicates, split and write every document; at once where it is done already.

    Held-out documents are those of `validation_sources`; without such, those that their source holds out (the embedded corpus, by
    module), and of the others a share drawn by the hash of their text. Raises UserError when a split ends up empty.
    """
    done = directory / "spool.json"
    if done.is_file():
        return Counts(**json.loads(done.read_text()))
    shutil.rmtree(directory, ignore_errors=True)
    counts = Counts({"train": 0, "valid": 0}, {"train": 0, "valid": 0})
    seen = Duplicates(settings.deduplicate) if settings.deduplicate is not None else None
    lowest, reported = 1.0, time.monotonic()
    with _Shards(directory, settings.shard_megabytes * 1_000_000) as shards:
        for document, always_valid in _documents(settings):
            text = documents.clean(document.text)
            if len(text) < settings.min_characters:
                counts.short += 1
                continue
            if seen is not None and not seen.first_seen(text):
                counts.duplicates += 1
                continue
            if document.held_out and settings.validation_sources and not always_valid:
                counts.held_out += 1
                continue
            drawn = fraction(text, "split")
            lowest = min(lowest, drawn)
            valid = always_valid or (drawn < settings.validation if document.held_out is None else document.held_out)
            split = "valid" if valid else "train"
            counts.documents[split] += 1
            counts.text_bytes[split] += shards.add(split, text)
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                print(f"tokenize: {sum(counts.documents.values()):,} documents, {sum(counts.text_bytes.values()) / 1e6:,.0f} MB read", flush=True)
    _check_filled(settings, counts, lowest)
    artifacts.write_json(done, asdict(counts))
    return counts


def shards(directory: Path, split: str) -> list[Path]:
    """The text shards of a split, in order."""
    return sorted((directory / split).glob("*.jsonl"))


def texts(path: Path) -> Iterator[str]:
    """The documents of one shard."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def sample(directory: Path, counts: Counts, size: int | None) -> Iterator[str]:
    """Training documents of about `size` bytes in all, drawn by the hash of their text; all of them where size is None."""
    share = 1.0 if size is None else size / max(counts.text_bytes["train"], 1)
    for path in shards(directory, "train"):
        yield from (text for text in texts(path) if fraction(text, "sample") < share)


def fraction(text: str, purpose: str) -> float:
    """A number in [0, 1) drawn by the text; other for another purpose."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _documents(settings: TokenizeSettings) -> Iterator[tuple[Document, bool]]:
    """Every document, and whether it is held out by its source; the held-out first, so that copies of them are dropped from train."""
    for source in settings.validation_sources:
        yield from ((document, True) for document in documents.read(source))
    for source in settings.sources:
        yield from ((document, False) for document in documents.read(source))


def _check_filled(settings: TokenizeSettings, counts: Counts, lowest: float) -> None:
    dropped = f"{counts.short} shorter than min_characters {settings.min_characters}, {counts.duplicates} duplicates"
    if not counts.documents["train"]:
        raise UserError(
            f"tokenize.sources ({_names(settings.sources)}): no document to train on ({dropped}, {counts.documents['valid']} held out);"
            " give more text, lower min_characters or validation, or name the right text column"
        )
    if settings.validation_sources and not counts.documents["valid"]:
        raise UserError(f"tokenize.validation_sources ({_names(settings.validation_sources)}): no document is left ({dropped}); give more text")
    if settings.validation and not counts.documents["valid"]:
        raise UserError(
            f"tokenize.validation {settings.validation} holds out none of {counts.documents['train']} documents;"
            f" set validation above {lowest:.4f}, give more documents or validation_sources, or set it to 0 for none"
        )


def _names(sources: tuple[Source, ...]) -> str:
    return ", ".join(source.path or source.hub or "embedded" for source in sources)


class _Shards:
    """Text files of about `size` bytes a split; a document is never cut."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._size = size
        self._files: dict[str, IO[str]] = {}
        self._written: dict[str, int] = {}
        self._count: dict[str, int] = {}

    def add(self, split: str, text: str) -> int:
        """Write one document; its bytes in UTF-8."""
        if self._written.get(split, self._size) >= self._size:
            self._next(split)
        size = len(text.encode())
        self._files[split].write(json.dumps(text, ensure_ascii=False) + "\n")
        self._written[split] += size
        return size

    def _next(self, split: str) -> None:
        if split in self._files:
            self._files[split].close()
        number = self._count[split] = self._count.get(split, -1) + 1
        self._written[split] = 0
        path = self._directory / split / f"{number:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files[split] = open(path, "w", encoding="utf-8")  # noqa: SIM115 closed by _next or __exit__

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
