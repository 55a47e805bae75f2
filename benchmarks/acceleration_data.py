"""The data of `acceleration.py`: its text, its rare words, and weights to start from."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils.extmath import randomized_svd

from pipeline import workflow
from pipeline.corpus.store import Store
from pipeline.launch.ranks import Ranks
from pipeline.models import build, export
from pipeline.models.positions import SinusoidalPositions
from pipeline.models.settings import ModelSettings
from pipeline.packing import word_counts

if TYPE_CHECKING:
    from acceleration_arms import Arm

WORD = re.compile(r"\w+|[^\w\s]")


def spaced(text: str) -> str:
    """Lower case, words and marks apart: what the vocabulary is small enough for."""
    return " ".join(WORD.findall(text.lower()))


def documents(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def tokens_of(store: Store) -> np.ndarray:
    """int64: all documents of a store, one after another."""
    return np.concatenate([store.read(document, 0, int(length)) for document, length in enumerate(store.lengths)]).astype(np.int64)


def prepare(arm: Arm) -> None:
    """The text, its tokens and the plan: the same for all arms of the seed."""
    texts = arm.work / f"{arm.size.name}.jsonl"
    if not texts.exists():
        texts.parent.mkdir(parents=True, exist_ok=True)
        with open(texts.with_suffix(".partial"), "w", encoding="utf-8") as file:
            for source in arm.size.sources:
                file.writelines(json.dumps({"text": spaced(text)}) + "\n" for text in documents(arm.data / source))
        texts.with_suffix(".partial").rename(texts)
    for stage in ("tokenize", "pack"):
        workflow.execute(arm.corpus, stage, Ranks())


def rare_until(arm: Arm) -> int:
    """The frequency up to which words of 100 occurrences or more bring a rare word into about a fifth of the rows."""
    kept = arm.work / f"{arm.size.name}-rare-{arm.seed}.json"
    if not kept.exists():
        _, counts = word_counts.count(arm.store("train"), arm.tokenizer)
        words = np.bincount(counts, minlength=101)
        occurrences = words[100:] * np.arange(100, len(words))
        # Rows meet words as if these were strewn evenly: with an average of a rare words in a row, 1 - exp(-a) of the rows have one.
        in_a_row = np.cumsum(occurrences) / (len(arm.plan("train").segments) - 1)
        kept.write_text(json.dumps(100 + int(np.searchsorted(1 - np.exp(-in_a_row), 0.2))))
    return int(json.loads(kept.read_text()))


def make_start(arm: Arm) -> None:
    """New weights; the token table from the training text's co-occurrences where the size says so, the same in all arms of a seed."""
    if arm.warm_from is not None or arm.start is None or arm.start.exists():
        return
    torch.manual_seed(arm.seed)
    settings = ModelSettings(**arm.model)
    model: Any = build.new(settings, arm.tokenizer, "mlm")
    with torch.no_grad():
        if arm.size.ppmi:
            vectors = torch.from_numpy(ppmi_vectors(arm, settings.init_std))
            seen = vectors.any(dim=1)
            model.get_input_embeddings().weight[seen] = vectors[seen]
        if arm.kind.sines:
            table = model.base_model.embeddings.positions.table.weight
            waves = SinusoidalPositions(model.config).embed(torch.zeros(1, *table.shape), None)[0]
            table.copy_(waves * settings.init_std / waves.square().mean().sqrt())
    partial = arm.start.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    export.save(model, arm.tokenizer, partial)
    partial.rename(arm.start)


def ppmi_vectors(arm: Arm, rms: float, window: int = 3) -> np.ndarray:
    """float32 [vocabulary, d]: the strongest singular directions of the positive pointwise mutual information of tokens `window` apart or less.

    Scaled to that root mean square; zero for tokens that the text lacks.
    """
    found = arm.work / "starts" / f"{arm.size.name}-ppmi-{arm.seed}.npy"
    if not found.exists():
        vocabulary, tokens = len(arm.tokenizer), tokens_of(arm.store("train"))
        counts = np.zeros((vocabulary, vocabulary), dtype=np.float32)
        for apart in range(1, window + 1):
            counts += np.bincount(tokens[:-apart] * vocabulary + tokens[apart:], minlength=vocabulary**2).reshape(counts.shape)
        counts += counts.T
        each = counts.sum(axis=1, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            ppmi = np.nan_to_num(np.maximum(np.log(counts * each.sum() / np.outer(each, each)), 0.0), nan=0.0)
        left, strength, _ = randomized_svd(ppmi, arm.size.model["hidden"], random_state=arm.seed)
        vectors = left * np.sqrt(strength)
        vectors[each == 0] = 0.0
        found.parent.mkdir(parents=True, exist_ok=True)
        np.save(found, (vectors * rms / np.sqrt(np.square(vectors[each > 0]).mean())).astype(np.float32))
    return np.load(found)
