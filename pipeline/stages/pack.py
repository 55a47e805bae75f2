"""Token store -> plans: which tokens make a row, which rows share a memory."""

from __future__ import annotations

from typing import Any

from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.store import Store
from pipeline.errors import UserError
from pipeline.packing import plan as plans
from pipeline.workflow import Work


def run(work: Work) -> dict[str, Any]:
    settings, tokenize = work.recipe.pack, work.input("tokenize")
    assert settings is not None
    tokenizer = tokenizers.load(tokenize / "tokenizer")
    stores = {"train": Store.open(tokenize / "train"), "valid": Store.open(tokenize / "valid") if (tokenize / "valid").is_dir() else None}
    made = {
        split: plans.make(
            *(work.directory / split, settings, work.recipe.model.kind, store, tokenizer),
            seed=work.recipe.seed,
            ranks=work.ranks,
            scratch=work.scratch / split,
        )
        for split, store in stores.items()
    }
    train, valid = made["train"], made["valid"]
    if not len(train.groups):
        raise UserError(f"{tokenize / 'train'}: no document gives a segment; lower pack.min_tokens, or give tokenize more text")
    return {
        "segments": len(train.segments) - 1,
        "groups": len(train.groups),
        "tokens": train.description["tokens"],
        "dropped_tokens": train.description["dropped_tokens"],
        "fill_rate": round(train.description["fill_rate"], 4),
        "valid_segments": len(valid.segments) - 1,
        **({"duplicates": train.description["duplicates"]["found"]} if "duplicates" in train.description else {}),
    }
