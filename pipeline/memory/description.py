"""What a datastore is made of, in `datastore.json`, and where its files lie. Imports nothing heavy: the workflow reads it.

    datastore.json            this description, written last
    shards/00000/keys.npy     float16 [n, d], where keys are kept
    shards/00000/values.npy   int32 [n], the token at each key's place; -1 where the entry was removed
    shards/00000/part.faiss   the shard's inverted lists, of kind ivfpq
    quantiser.faiss           what every part is made with: lists and codes, no entries
    projection.npz            `components` float32 [r, d], `mean` float32 [d]: what lists and codes are made of, of kind ivfpq
    documents.jsonl           a line a document: number, key (where it came from), first and count (its entries), sha256 (of its tokens), preview
    tokenizer/                what encodes further documents

Entries are numbered through all shards. Whatever is removed leaves a gap: numbers never change.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.errors import UserError

FORMAT = 1
NAME = "datastore.json"
INTENT = "change.json"
"""A change that was begun: with it there, `changes.complete` makes an end of it."""

Description = dict[str, Any]
"""format; key; metric; kind; dimensions; keep_keys; window {block, context}; model {path, fingerprint, memory_module, encoder};
tokenizer (its fingerprint); shards (entries of each); entries (still there); documents (still there);
next_document; shard_keys; files {name: {bytes, sha256}}; revision, and made: the one it was made with."""


def locate(directory: str | Path) -> Path:
    """The datastore of a directory: itself, or inside the artifact of an index stage. Raises UserError when there is none."""
    for place in (Path(directory), Path(directory) / "datastore"):
        if (place / NAME).is_file():
            return place
    raise UserError(f"{directory}: no datastore here (no {NAME}); give what the index stage made, such as runs/NAME/index-1234abcd")


def read(directory: Path) -> Description:
    """Raises UserError when the description is missing, unreadable or of another format."""
    path = directory / NAME
    remedy = "run the index stage again (remove its directory first)"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise UserError(f"{path}: format {found['format']!r}, this Trimline reads {FORMAT}; {remedy}")
        _ = found["files"], found["shards"], found["revision"], found["model"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}, or give the directory that holds it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable description ({type(error).__name__}: {error}); {remedy}") from None
    return dict(found)


def write(directory: Path, about: Description, known: dict[str, Any] | None = None) -> Description:
    """Write the description with the sizes and digests of all files, and the revision that follows from them; returns it.

    known: entries of `files` that are taken as they are.
    """
    files = {}
    for name in _names(directory, about):
        entry = (known or {}).get(name)
        files[name] = entry or {"bytes": (directory / name).stat().st_size, "sha256": artifacts.sha256(directory / name)}
    revision = hashlib.sha256(json.dumps([sorted((name, entry["sha256"]) for name, entry in files.items())]).encode()).hexdigest()
    written = {"made": revision, **about, "files": files, "revision": revision}
    artifacts.write_json(directory / NAME, written)
    return written


def shard(directory: Path, number: int) -> Path:
    return directory / "shards" / f"{number:05d}"


def revision(directory: str | Path) -> str:
    """Hash of a datastore's contents, another one after every addition and removal; a change that was cut off is completed first."""
    place = locate(directory)
    complete(place)
    return str(read(place)["revision"])


def changed(directory: str | Path) -> str | None:
    """The revision of a datastore that documents were added to or withdrawn from since it was made; None where none were."""
    found = revision(directory)
    return None if found == read(locate(directory))["made"] else found


def complete(directory: Path) -> None:
    """Make an end of a change that was cut off; nothing where there is none."""
    if (directory / INTENT).is_file():
        from pipeline.memory import changes

        changes.complete(directory)


def check_sizes(directory: Path, about: Description) -> None:
    """Raises UserError naming the first file that is missing or has another size than the description says."""
    for name, entry in about["files"].items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != entry["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes, {'truncated' if found < entry['bytes'] else 'altered'}"
            raise UserError(f"{path}: {state}; {NAME} says {entry['bytes']} bytes: restore it, or remove {directory} and make the datastore again")


def _names(directory: Path, about: Description) -> list[str]:
    folders = [*(shard(directory, number) for number in range(len(about["shards"]))), directory / "tokenizer"]
    singles = [path for name in ("quantiser.faiss", "projection.npz", "documents.jsonl") if (path := directory / name).is_file()]
    inside = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [path.relative_to(directory).as_posix() for path in (*singles, *inside)]
