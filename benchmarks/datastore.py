"""What looking up an external memory costs, and what an approximate search loses: every kind of search on the same keys, beside no memory.

    python benchmarks/datastore.py --data DIR [--model DIR | --model-steps 600] [--keys 3000000] [--tokens 8192] [--work DIR] [--device cuda]

DIR holds wikipedia/train.jsonl.gz, a {"text": ...} a line; its last documents are the test text. Without --model a decoder of 22 million
parameters is trained on the rest, and a vocabulary of 8,000 for it. Small enough to try in a minute or two:

    python benchmarks/datastore.py --data DIR --model-steps 20 --hidden 64 --layers 2 --vocab 2000 --keys 60000 --tokens 1024 --lists 256

One process, all its cores. Columns: bytes on disk for each entry (keys, codes, values, everything); milliseconds of each token that is
scored, alone and with the k nearest entries looked up, medians of passes over the whole test text taken in turn; their ratio; how many of the exact k
nearest are found; perplexity of p = (1 - lambda) p_LM + lambda p_kNN (Khandelwal et al. 2020), and by how much it exceeds that of the
exact search. Keys are made on --device, all else runs on the CPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.settings import Source, Specification
from pipeline.corpus.store import Store
from pipeline.launch.ranks import Ranks
from pipeline.memory import building, documents
from pipeline.memory.building import Window
from pipeline.memory.datastore import Datastore
from pipeline.memory.reading import Text, read, windows
from pipeline.memory.settings import IndexSettings
from pipeline.models import build, export, identity, size
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForCausalLM
from pipeline.models.stopwatch import device_name
from pipeline.packing.plan import tokenizer_identity

CHUNK = 256
"""Rows of the vocabulary's scores held at a time."""
SEED = 1


def kinds(given: argparse.Namespace) -> dict[str, tuple[dict[str, Any], list[int]]]:
    """Name -> settings of the index, and the numbers of lists to visit."""
    lists = {"kind": "ivfpq", "lists": given.lists or None}
    found: dict[str, tuple[dict[str, Any], list[int]]] = {
        "ivfpq, 4 bits, keys kept": (lists, given.probe),
        "ivfpq, 8 bits, keys kept": ({**lists, "bits": 8}, given.probe[-1:]),
        "ivfpq, 4 bits, keys dropped": ({**lists, "bits": 4, "keep_keys": False}, given.probe[-1:]),
        "ivfpq, 8 bits, keys dropped": ({**lists, "bits": 8, "keep_keys": False}, given.probe[-1:]),
    }
    for dimensions in given.reduce:
        found[f"ivfpq, 4 bits, {dimensions} components, keys kept"] = ({**lists, "reduce": dimensions}, given.probe)
    return {name: kind for name, kind in found.items() if not given.only or any(part in name for part in given.only)}


# -- model and keys --------------------------------------------------------------------------------------------------


def texts(data: Path, folder: Path, held_out: int) -> tuple[Path, Path]:
    """Two corpus files: all documents but the last `held_out`, and those."""
    with gzip.open(data / "wikipedia" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.dumps({"text": json.loads(line)["text"]}) for line in lines]
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, part in zip(paths, (rows[:-held_out], rows[-held_out:]), strict=True):
        path.write_text("\n".join(part) + "\n")
    return paths


def vocabulary(path: Path, size: int, directory: Path) -> None:
    if not directory.is_dir():
        with open(path, encoding="utf-8") as lines:
            sample = (json.loads(line)["text"] for number, line in enumerate(lines) if number % 4 == 0)
            tokenizers.train(Specification(kind="unigram", vocab_size=size, sample_megabytes=8), sample, directory)


def train(store: Store, given: argparse.Namespace, vocab: int, directory: Path) -> None:
    """A decoder, trained by AdamW on windows drawn at random."""
    torch.manual_seed(SEED)
    length, width = given.block + given.context, 64 if given.hidden % 64 == 0 else 16
    config = TrimlineConfig(
        vocab_size=vocab, hidden_size=given.hidden, head_dim=width, heads_per_layer=[given.hidden // width] * given.layers,
        ffn_per_layer=[4 * given.hidden] * given.layers, kind="decoder", norm="pre", max_position_embeddings=length, dropout=0.0,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    model = TrimlineForCausalLM(config).to(given.device)
    stream = Text.of(store, np.arange(len(store))).tokens
    draws = np.random.default_rng(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=given.model_steps, pct_start=0.1)
    for step in range(given.model_steps):
        starts = draws.integers(0, len(stream) - length - 1, size=given.batch)
        rows = torch.from_numpy(stream[starts[:, None] + np.arange(length)]).to(given.device)
        with torch.autocast(rows.device.type, torch.bfloat16):
            logits = model(input_ids=rows).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % max(given.model_steps // 10, 1) == 0:
            print(f"step {step + 1} of {given.model_steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    export.save(model.cpu(), None, directory)


def index(work: Path, name: str, store: Store, reader: CausalReader, given: argparse.Namespace, settings: dict[str, Any]) -> tuple[Datastore, float]:
    """A datastore of the store's documents, and the seconds its lists took; keys once made are linked, not made again."""
    directory, made = work / name, work / "keys"
    tokenizer = tokenizers.load(work / "tokenizer")
    whole = IndexSettings.model_validate({"max_keys": given.keys, **settings})
    for shard in sorted(made.glob("shards/?????")):
        (directory / "shards" / shard.name).mkdir(parents=True, exist_ok=True)
        for file in ("keys.npy", "values.npy"):
            if not (directory / "shards" / shard.name / file).exists():
                os.link(shard / file, directory / "shards" / shard.name / file)
    begun = time.perf_counter()
    building.build(
        directory, store, [f"document {number}" for number in range(len(store))], reader, whole, Window(given.block, given.context, 16),
        model={"path": str(work / "model"), "fingerprint": identity.fingerprint(work / "model"), "memory_module": None, "encoder": False},
        tokenizer=tokenizer, tokenizer_directory=work / "tokenizer", tokenizer_fingerprint=tokenizer_identity(tokenizer),
        seed=SEED, ranks=Ranks(), device=given.device if directory == made else "cpu",
    )  # fmt: skip
    return Datastore.open(directory), time.perf_counter() - begun


# -- scoring ---------------------------------------------------------------------------------------------------------


Found = tuple[Tensor, Tensor]


def score(reader: CausalReader, text: Text, spans: np.ndarray, search: Callable[[Tensor], Found] | None, rate: float, heat: float) -> Iterator[Any]:
    """Losses float32 [n] of each batch of windows, and what was found for it."""
    targets = torch.from_numpy(text.tokens)
    for batch in read(reader, text, spans, batch_size=16):
        hidden, states, places = batch.scored()
        wanted = targets[places]
        partition, target = reader.scores(hidden, wanted, CHUNK)
        log_p, found = target - partition, None
        if search is not None:
            found = search(states)
            scores, values = found
            share = torch.softmax(scores / heat, dim=1).mul_(values == wanted[:, None]).sum(dim=1)
            log_p = torch.logaddexp(log_p + math.log1p(-rate), torch.log(share) + math.log(rate))
        yield -log_p, found


@torch.inference_mode()
def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        compare(given, work)


def prepared(given: argparse.Namespace, work: Path) -> tuple[CausalReader, Store, Text]:
    """The model, the documents to index and the test text."""
    train_text, test_text = texts(given.data, work, given.held_out)
    if given.model is None:
        vocabulary(train_text, given.vocab, work / "tokenizer")
    elif not (work / "tokenizer").exists():
        tokenizers.load(given.model).save_pretrained(work / "tokenizer")
    store, _ = documents.encode([Source(path=str(train_text))], work / "tokenizer", work / "train")
    test, _ = documents.encode([Source(path=str(test_text))], work / "tokenizer", work / "test")
    if not (work / "model").exists():
        if given.model is None:
            with torch.inference_mode(False):
                train(store, given, len(tokenizers.load(work / "tokenizer")), work / "model")
        else:
            (work / "model").symlink_to(given.model.resolve())
    model = build.load(work / "model", head="causal")
    text = Text.of(test, np.arange(len(test)), max_document_tokens=given.document_tokens)
    return CausalReader(model), store, Text(text.tokens[: given.tokens], text.document[: given.tokens])


def compare(given: argparse.Namespace, work: Path) -> None:
    reader, store, text = prepared(given, work)
    spans = windows(text, given.block, given.context, within_documents=True)
    places = int((spans[:, 2] - spans[:, 1]).sum())
    begun = time.perf_counter()
    exact = index(work, "keys", store, reader, given, {"kind": "flat"})[0]
    print(
        f"\n{size.parameters(reader.model) / 1e6:.1f} M parameters, {len(exact):,} entries of {exact.dimensions} dimensions read in"
        f" {time.perf_counter() - begun:.0f} s on {given.device}; {places:,} tokens scored in windows of {given.block} after {given.context};"
        f" k = {given.k}, lambda {given.rate}, temperature {given.heat}\n{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}, {platform.platform()}\n"
    )

    def passed(search: Callable[[Tensor], Found] | None) -> tuple[float, float, list[Found]]:
        begun = time.perf_counter()
        parts = list(score(reader, text, spans, search, given.rate, given.heat))
        seconds = time.perf_counter() - begun
        loss = torch.cat([part[0] for part in parts]).mean(dtype=torch.float64).item()
        return 1000 * seconds / places, math.exp(loss), [part[1] for part in parts]

    plain_time, plain, _ = passed(None)
    exact_time, best, truth = passed(lambda states: exact.search(states, given.k, exact=True))
    print("| search | bytes an entry | ms plain | ms with memory | ratio | recall | perplexity | above exact | lists made in s |")
    print("|---|---|---|---|---|---|---|---|---|")
    row("none", None, plain_time, plain_time, None, plain, best, None)
    row("exact", exact, plain_time, exact_time, 1.0, best, best, None)
    for name, (settings, probes) in kinds(given).items():
        opened, seconds = index(work, name.replace(", ", "-").replace(" ", "-"), store, reader, given, settings)
        for opened.probe in probes:
            passed(lambda states, opened=opened: opened.search(states, given.k))  # type: ignore[misc]
            turns = [(passed(None), passed(lambda states, opened=opened: opened.search(states, given.k))) for _ in range(given.turns)]  # type: ignore[misc]
            alone, together = (statistics.median(turn[side][0] for turn in turns) for side in range(2))
            _, perplexity, found = turns[0][1]
            row(f"{name}, {opened.probe} of {opened._index.nlist} lists", opened, alone, together, recall(found, truth), perplexity, best, seconds)


def recall(found: list[Found], truth: list[Found]) -> float:
    """Share of the exact nearest whose score is reached: entries found that score no less than the least of the truth, over k."""
    pairs = [(one[0] >= other[0][:, -1:] * (1 - 1e-5)).float().mean(dim=1) for one, other in zip(found, truth, strict=True)]
    return torch.cat(pairs).mean().item()


def row(
    name: str, store: Datastore | None, alone: float, together: float, found: float | None, perplexity: float, best: float, seconds: float | None
) -> None:
    size = "" if store is None else f"{sum(entry['bytes'] for entry in store.description['files'].values()) / len(store):.0f}"
    reached = "" if found is None or (store is not None and not store.description["keep_keys"]) else f"{found:.3f}"
    made = "" if seconds is None else f"{seconds:.0f}"
    times = f"{alone:.3f} | {together:.3f} | {together / alone:.2f}"
    print(f"| {name} | {size} | {times} | {reached} | {perplexity:.2f} | {perplexity / best - 1:+.2%} | {made} |", flush=True)


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--work", type=Path, help="where model and keys are kept for another run; default: nowhere")
    options.add_argument("--model", type=Path, help="a causal model with its tokenizer, instead of one trained here")
    options.add_argument("--device", default="cpu", help="where the model is trained and keys are made")
    for name, default in (
        *(("model-steps", 600), ("batch", 16), ("hidden", 384), ("layers", 11), ("vocab", 8000), ("keys", 3_000_000), ("lists", 0)),
        *(("tokens", 8192), ("held-out", 200), ("document-tokens", 1024), ("block", 128), ("context", 128), ("k", 64), ("turns", 3)),
    ):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--probe", type=int, nargs="+", default=[8, 32, 128])
    options.add_argument("--reduce", type=int, nargs="*", default=[64])
    options.add_argument("--only", nargs="+", help="kinds of search whose names contain one of these")
    options.add_argument("--rate", type=float, default=0.25, help="lambda")
    options.add_argument("--heat", type=float, default=0.5, help="temperature of p_kNN, in units of q.k / sqrt(d)")
    return options.parse_args()


if __name__ == "__main__":
    main()
