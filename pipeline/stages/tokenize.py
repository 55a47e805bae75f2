"""tokenize: documents -> `train/` and `valid/` token stores, `tokenizer/`, and what they hold in `corpus.json`.

The first rank reads the corpus into shards of clean text and makes the tokenizer. Every rank then encodes the shards that fall to it;
a shard whose store is there is done, so killed work goes on where it stopped. Which rank encodes a shard does not change its content.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.corpus import sources, spool, tokenizer
from pipeline.corpus.settings import TokenizeSettings
from pipeline.corpus.spool import Counts
from pipeline.corpus.store import Store, Writer, token_dtype
from pipeline.workflow import Work

SPLITS = ("train", "valid")
_BATCH = 4_000_000
"""Characters encoded at a time: bounds memory at some hundred MB."""


def run(work: Work) -> dict[str, Any]:
    """Make the artifact; returns documents, duplicates, tokens and bytes of text by split, vocabulary size, bytes a token."""
    settings = work.recipe.tokenize
    assert settings is not None
    text, summary = work.directory / "text", work.directory / "corpus.json"
    if not summary.is_file():
        if work.ranks.first:
            counts = spool.write(settings, text)
            make_tokenizer(settings, text, counts, work.directory / "tokenizer")
        work.ranks.barrier()
        encode(text, work.directory, work.ranks.rank, work.ranks.size)
        work.ranks.barrier()
        if work.ranks.first:
            artifacts.write_json(summary, describe(spool.write(settings, text), work.directory))
    if not work.ranks.first:
        return {}
    shutil.rmtree(text, ignore_errors=True)
    return dict(json.loads(summary.read_text()))


def make_tokenizer(settings: TokenizeSettings, text: Path, counts: Counts, directory: Path) -> None:
    """Train the tokenizer on a sample of the training documents, or take the one the recipe names."""
    if directory.is_dir():
        return
    path = sources.tokenizer_path(settings.tokenizer)
    if path.suffix in (".yaml", ".yml"):
        specification = sources.specification(path, settings.vocab_size)
        print(f"tokenize: {sum(counts.documents.values()):,} documents read; making the {specification.kind} tokenizer", flush=True)
        megabytes = specification.sample_megabytes
        tokenizer.train(specification, spool.sample(text, counts, megabytes * 1_000_000 if megabytes is not None else None), directory)
    else:
        tokenizer.take(path, directory, spool.sample(text, counts, 1_000_000))


def encode(text: Path, directory: Path, rank: int, size: int) -> None:
    """Encode every size-th shard, from the rank-th, that has no store yet."""
    encoder = tokenizer.Encoder(directory / "tokenizer")
    todo = [(split, path) for split in SPLITS for path in spool.shards(text, split)]
    for number, (split, path) in list(enumerate(todo, 1))[rank::size]:
        prefix = directory / split / path.stem
        if prefix.with_suffix(".idx").is_file():
            continue
        prefix.parent.mkdir(exist_ok=True)
        with Writer(prefix, token_dtype(encoder.vocab_size)) as writer:
            for batch in _batches(spool.texts(path)):
                for ids in encoder.encode(batch):
                    writer.add(ids)
        print(f"tokenize: shard {number} of {len(todo)} encoded ({split}/{path.stem})", flush=True)


def describe(counts: Counts, directory: Path) -> dict[str, Any]:
    """The figures of a finished corpus, as plain values."""
    stores = {split: Store.open(directory / split) for split in SPLITS if counts.documents[split]}
    tokens = {split: int(stores[split].lengths.sum()) if split in stores else 0 for split in SPLITS}
    return {
        "documents": sum(counts.documents.values()),
        "duplicates": counts.duplicates,
        **{f"{split}_documents": counts.documents[split] for split in SPLITS},
        **{f"{split}_tokens": tokens[split] for split in SPLITS},
        **{f"{split}_bytes": counts.text_bytes[split] for split in SPLITS},
        "vocab_size": len(tokenizer.load(directory / "tokenizer")),
        "bytes_per_token": round(counts.text_bytes["train"] / tokens["train"], 3),
    }


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
