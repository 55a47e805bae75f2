"""A causal language model and documents -> a datastore of its keys and values, to look up when it is tested.

The documents are those the run trains on, or other `sources`. Every rank reads its share of them into shards, which a later attempt finds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.store import Store
from pipeline.errors import UserError
from pipeline.memory import building, documents
from pipeline.memory.building import Window
from pipeline.memory.settings import IndexSettings
from pipeline.models import build, identity
from pipeline.models.causal_reader import CausalReader
from pipeline.models.device import of_rank
from pipeline.packing.plan import tokenizer_identity
from pipeline.workflow import Work

DATASTORE = "datastore"


def run(work: Work) -> dict[str, Any]:
    """Make the artifact; returns entries, documents, dimensions, and bytes on disk for each entry."""
    recipe, settings = work.recipe, work.recipe.index
    assert settings is not None
    place = work.input("tokenize") / "tokenizer"
    tokenizer = tokenizers.load(place)
    block, context = settings.window.resolved(recipe.pack.length if recipe.pack else None)
    model, about = key_model(work, tokenizer, settings, block + context)
    store, keys = documents_of(work, settings, place)
    made = building.build(
        work.directory / DATASTORE,
        store,
        keys,
        CausalReader(model, about["memory_module"]),
        settings,
        Window(block, context, settings.batch_size),
        model=about,
        tokenizer=tokenizer,
        tokenizer_directory=place,
        tokenizer_fingerprint=tokenizer_identity(tokenizer),
        seed=recipe.seed,
        ranks=work.ranks,
        device=of_rank(work.ranks.rank),
    )
    if made is None:
        return {}
    size = sum(entry["bytes"] for entry in made["files"].values())
    figures = {name: made[name] for name in ("entries", "documents", "dimensions", "kind")}
    return {**figures, "bytes_per_entry": round(size / made["entries"], 1)}


def key_model(work: Work, tokenizer: Any, settings: IndexSettings, length: int) -> tuple[Any, dict[str, Any]]:
    """The model whose states are the keys, and what the datastore says of it: the encoder, the run's own, or the one that stands in for it."""
    recipe = work.recipe
    own = work.input("pretrain") / "model" if recipe.pretrain else recipe.model.from_
    path = Path(settings.encoder or own or "").resolve()
    if settings.encoder and (path / "tokenizer.json").is_file() and tokenizer_identity(tokenizers.load(path)) != tokenizer_identity(tokenizer):
        raise UserError(f"index.encoder {path}: has another tokenizer than the run; give a model that was trained with the run's tokenizer")
    model = build.load(path, head="causal", trust_remote_code=recipe.model.trust_remote_code)
    build.check_fits(model, tokenizer, length)
    about = {
        "path": str(path),
        "fingerprint": identity.fingerprint(path),
        "memory_module": None if settings.encoder else recipe.model.memory_module,
        "encoder": settings.encoder is not None,
    }
    return model, about


def documents_of(work: Work, settings: IndexSettings, tokenizer: Path) -> tuple[Store, Sequence[str]]:
    """The documents to index, and where each came from."""
    if not settings.sources:
        store = Store.open(work.input("tokenize") / "train")
        return store, [f"train document {number}" for number in range(len(store))]
    text = work.scratch / "text"
    if work.ranks.first:
        documents.encode(settings.sources, tokenizer, text)
    work.ranks.barrier()
    return Store.open(text), json.loads((text / documents.KEYS).read_text())
