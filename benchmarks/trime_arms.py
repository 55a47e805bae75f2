"""The arms of `trime.py`: their data, their training by `trimline`, and what their models score with each memory."""

from __future__ import annotations

import argparse
import concurrent.futures
import gzip
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipeline import objectives, workflow
from pipeline import recipe as recipes
from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.store import Store, Writer, token_dtype
from pipeline.errors import UserError
from pipeline.evaluation import memories
from pipeline.evaluation.settings import EvaluateSettings
from pipeline.memory.external import External
from pipeline.models import build
from pipeline.models.causal_reader import CausalReader
from pipeline.objectives.base import Trainee
from pipeline.packing.loader import Loader
from pipeline.packing.plan import Plan, tokenizer_identity

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 128
SIZES = (512, 1024, 2048, 8192)
DOCUMENT_CAP = 1536
LONG = 2048
"""Long memory beside the datastore."""

ARMS: dict[str, list[str]] = {
    "plain": ["pretrain.objective={name: causal, chunk: 256}"],
    "consecutive": ["pretrain.objective={name: causal, chunk: 256}", "pack.groups=consecutive", "pack.mix_documents=true"],
    "trimelm": ["pretrain.objective={name: trimelm, chunk: 256}"],
    "long": ["pretrain.objective={name: trimelm_long, chunk: 256}", "pack.groups=consecutive", "pack.mix_documents=true"],
    "long-stopped": [
        "pretrain.objective={name: trimelm_long, key_gradients: own_segment, chunk: 256}",
        "pack.groups=consecutive",
        "pack.mix_documents=true",
    ],
    "ext": ["pretrain.objective={name: trimelm_ext, chunk: 256}", "pack.groups=bm25"],
    "ext-random": ["pretrain.objective={name: trimelm_ext, chunk: 256}", "pack.groups=random"],
    **{
        f"ext-p{p:g}": [f"pretrain.objective={{name: trimelm_ext, local_dropped: {p}, chunk: 256}}", "pack.groups=bm25"] for p in (0.0, 0.1, 0.5, 1.0)
    },
}
STORED = ("plain", "trimelm", "long", "ext", "ext-random")
"""Arms that are tested with a datastore too."""


# -- data and training -------------------------------------------------------------------------------------------------


def documents(path: Path, minimum: int = 4000) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if len(text := json.loads(line)["text"]) >= minimum:
                yield text


def prepare(options: argparse.Namespace) -> Path:
    """Writes the texts and the recipe that all arms share; the recipe's path."""
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "recipe.yaml"
    shape = {
        "kind": "decoder",
        "norm": "pre",
        "layers": options.layers,
        "hidden": options.width,
        "heads": options.width // 32,
        "ffn": 4 * options.width,
    }
    content = {
        "name": f"tokens-{options.tokens}",
        "runs_dir": str(options.work / "runs"),
        "tokenize": {
            "sources": [str(options.work / f"train-{options.tokens}.jsonl")],
            "validation": 0,
            "validation_sources": [str(options.work / "held-out.jsonl")],
            "tokenizer": "unigram",
            "vocab_size": options.vocabulary,
            "deduplicate": None,
        },
        "pack": {"length": LENGTH, "bm25": {"near_duplicates": "keep"}},
        "model": {**shape, "dropout": 0.0, "max_length": LENGTH},
        "pretrain": {
            "batch_size": options.batch,
            "micro_batch_size": options.batch,
            "lr": options.lr,
            "betas": [0.9, 0.95],
            "schedule": "cosine",
            "min_lr_ratio": 0.1,
            "warmup_ratio": min(0.2, 100 * options.batch * LENGTH / options.tokens),
            "deepspeed": options.deepspeed,
            "log_every": 50,
            "checkpoint_every": 1000,
        },
        "index": {"max_keys": options.keys, "window": {"block": LENGTH, "context": 0}, "kind": "flat"},
        "evaluate": {},
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    if not (options.work / f"train-{options.tokens}.jsonl").exists():
        _write(options.data / "wikipedia" / "train.jsonl.gz", options, options.tokens * 3.6, f"train-{options.tokens}.jsonl", "held-out.jsonl")
        _write(options.data / "books" / "train.jsonl.gz", options, 4e6, "books.jsonl", "books-held-out.jsonl")
    return path


def _write(source: Path, options: argparse.Namespace, characters: float, train: str, held_out: str) -> None:
    """A twentieth of the documents is held out, by hash; of books, which are few, chapters of 20,000 characters are the documents."""
    kept: dict[bool, list[str]] = {True: [], False: []}
    for text in documents(source):
        for part in (text[at : at + 20_000] for at in range(0, len(text), 20_000)) if "books" in train else (text,):
            kept[hashlib.sha256(part.encode()).digest()[0] < 256 // 20].append(part)
    for name, parts, limit in ((held_out, kept[True], 600_000), (train, kept[False], characters)):
        total = 0
        with open(options.work / f".{name}", "w", encoding="utf-8") as file:
            for part in parts:
                if total < limit:
                    total += len(part)
                    file.write(json.dumps({"text": part}) + "\n")
        os.rename(options.work / f".{name}", options.work / name)


@dataclass(frozen=True)
class Arm:
    """One training: its overrides, and what came of it."""

    name: str
    seed: int
    path: Path
    overrides: tuple[str, ...]

    @property
    def recipe(self) -> recipes.Recipe:
        return recipes.load(self.path, self.overrides)

    def artifact(self, stage: str, *more: str) -> Any:
        steps = workflow.resolve(recipes.load(self.path, (*self.overrides, *more)))
        return next(step.artifact for step in steps if step.stage == stage)

    def make(self, stage: str, *more: str, threads: int = 1) -> None:
        command = [sys.executable, "-m", "pipeline", stage, str(self.path), *self.overrides, *more]
        log = self.path.parent / "logs" / f"{self.name}-{self.seed}-{stage}.txt"
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as file:
            done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise UserError(f"{self.name}: trimline {stage} failed, see {log}")


def arms_of(options: argparse.Namespace, path: Path) -> list[Arm]:
    """Every arm and seed, its number of steps such that each segment is seen once."""
    made = []
    for seed in options.seeds:
        probe = Arm("plain", seed, path, (f"seed={seed}", *ARMS["plain"]))
        for stage in ("tokenize", "pack"):
            probe.make(stage, threads=2)
        steps = probe.artifact("pack").metrics["segments"] // options.batch
        for name in options.arms:
            size = 1 if "pack.groups" not in " ".join(ARMS[name]) else options.group_size
            made.append(Arm(name, seed, path, (f"seed={seed}", *ARMS[name], f"pack.group_size={size}", f"pretrain.steps={steps}")))
    return made


def train(arms: list[Arm], jobs: int) -> None:
    for arm in arms:
        arm.make("pack", threads=2)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for arm, _ in zip(arms, pool.map(lambda arm: arm.make("pretrain"), arms), strict=True):
            metrics = arm.artifact("pretrain").metrics
            print(f"trained {arm.name}, seed {arm.seed}: {metrics}", file=sys.stderr, flush=True)


# -- testing -----------------------------------------------------------------------------------------------------------


@cache
def reader(arm: Arm) -> CausalReader:
    return CausalReader(build.load(arm.artifact("pretrain").path / "model", head="causal"))


@cache
def tokenizer(arm: Arm) -> Any:
    return tokenizers.load(arm.artifact("tokenize").path / "tokenizer")


@cache
def held_out(arm: Arm, domain: str) -> Store:
    """The held-out documents of a domain, in the arm's tokens."""
    if domain == "wikipedia":
        return Store.open(arm.artifact("tokenize").path / "valid")
    directory = arm.path.parent / f"books-{arm.artifact('tokenize').path.name}"
    if not directory.exists():
        encoder = tokenizers.Encoder(arm.artifact("tokenize").path / "tokenizer")
        directory.with_suffix(".partial").mkdir(exist_ok=True)
        with Writer(directory.with_suffix(".partial") / "00000", token_dtype(encoder.vocab_size)) as writer:
            lines = (arm.path.parent / "books-held-out.jsonl").read_text(encoding="utf-8").splitlines()
            for ids in encoder.encode([json.loads(line)["text"] for line in lines]):
                writer.add(ids)
        directory.with_suffix(".partial").rename(directory)
    return Store.open(directory)


def results_of(
    arm: Arm, names: tuple[str, ...], *, size: int = LONG, tokens: int, domain: str = "wikipedia", store: External | None = None, **fixed: float
) -> memories.Tested:
    """The arm's model with those memories on the held-out documents of a domain."""
    settings = EvaluateSettings(
        memory=list(names), window={"block": LENGTH, "context": 0}, within_documents=False, long={"size": size, "reset": False},
        max_document_tokens=DOCUMENT_CAP, max_tokens=tokens, fixed=fixed, external={"k": [16, 64, 256]},
    )  # fmt: skip
    return memories.evaluate(
        reader(arm), held_out(arm, domain), tokenizer(arm), settings, row_length=LENGTH, within_documents=False,
        store=store.store if store else None, encoder=store.encoder if store else None, scratch=arm.path.parent / "measured",
        identity=f"{arm.artifact('pretrain').path.name} {store and store.identity}",
    )  # fmt: skip


Row = dict[str, memories.Result]


def measure(arm: Arm, tokens: int) -> Row:
    """Results by memory; `+1024`: own segment and the last 1,024 tokens, `+1024 bias` with a tuned constant on these, `cache+1024` the linear mix."""
    found: Row = {}
    sizes = SIZES[1:3] if arm.name.startswith("ext-p") else SIZES
    for size in sizes:
        several = ("none", "local", "local+long", "cache", "cache+long") if size == sizes[0] else ("local+long", "cache+long")
        results = {result.memory: result for result in results_of(arm, several, size=size, tokens=tokens).results}
        for name in ("none", "local", "cache"):
            if name in results:
                found[name] = results[name]
        found[f"+{size} bias"], found[f"cache+{size}"] = results["local+long"], results["cache+long"]
        (found[f"+{size}"],) = results_of(arm, ("local+long",), size=size, tokens=tokens, bias=0.0).results
    (found["local, temperature 1"],) = results_of(arm, ("local",), tokens=tokens, temperature=1.0).results
    return found


def with_store(arm: Arm, options: argparse.Namespace, domain: str, of: str) -> Row:
    """The same with a datastore of a domain, on fewer tokens."""
    books = [f"index.sources=[{options.work / 'books.jsonl'}]"] if of == "books" else []
    arm.make("index", *books, threads=2)
    place = arm.artifact("index", *books).path / "datastore"
    store = External.open(place, arm.artifact("pretrain").path / "model", tokenizer_identity(tokenizer(arm)))
    names = ("none", "knn", "knn+cache+long", "external", "local+long", "local+long+external")
    found = {result.memory: result for result in results_of(arm, names, tokens=options.store_tokens, domain=domain, store=store).results}
    if arm.name == "plain" and domain == of == "wikipedia":
        untuned = {"store_temperature": 1.0, "store_bias": 0.0}
        found["external, untuned"] = results_of(arm, ("external",), tokens=options.store_tokens, store=store, **untuned).results[0]
    return found


def own_prefix(result: memories.Tested) -> tuple[np.ndarray, np.ndarray]:
    """Of each scored place, its position in the window, and whether the window holds the target earlier."""
    places = result.places
    position = (places - 1) % LENGTH
    seen = np.array([result.text.tokens[place] in result.text.tokens[place - at : place] for place, at in zip(places, position, strict=True)])
    return position, seen


def training_speed(arms: list[Arm], turns: int = 4, steps: int = 6) -> dict[str, float]:
    """Tokens per CPU second of each arm's training step over plain's: plain PyTorch, one thread, in turn, the best turn of each."""
    torch.set_num_threads(1)
    ready: dict[str, Callable[[int], None]] = {}
    for arm in {arm.name: arm for arm in arms}.values():
        recipe, settings = arm.recipe, arm.recipe.pretrain
        assert settings is not None
        batches = Loader(
            Plan.open(arm.artifact("pack").path / "train"), Store.open(arm.artifact("tokenize").path / "train"), tokenizer(arm), settings.batch_size,
            1, places=settings.objective.needs_places,
        )  # fmt: skip
        torch.manual_seed(0)
        model = build.new(recipe.model, tokenizer(arm))
        objective = objectives.build(settings.objective, tokenizer(arm), 1, group_size=batches.plan.group_size)
        trainee = Trainee(model, objective).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(number: int, trainee: Any = trainee, batches: Any = batches, optimizer: Any = optimizer) -> None:
            batch = trainee.prepare({name: torch.from_numpy(array) for name, array in batches.batch(number).items()}, number)
            losses = trainee(batch, number)
            sum(loss for name, loss in losses.items() if name not in trainee.figures).backward()
            torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        ready[arm.name] = step
    best = dict.fromkeys(ready, math.inf)
    for turn in range(turns):
        for name, step in ready.items():
            start = time.process_time()
            for number in range(steps):
                step(number)
            best[name] = min(best[name], time.process_time() - start) if turn else math.inf
    torch.set_num_threads(2)
    return {name: best.get("plain", math.nan) / seconds for name, seconds in best.items()}
