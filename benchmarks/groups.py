"""How alike the segments of a group are, by policy: random, consecutive, TRIME's chain, matching without and with swaps; by search: exact, capped.

    python benchmarks/groups.py --data DIR [--segments 60000] [--length 256] [--size 8]

DIR holds wikipedia/train.jsonl.gz and books/train.jsonl.gz, a {"text": ...} a line. Segments are runs of lower-case words, chunks of 100
neighbours drawn at random, in the order of their documents; k = 20 neighbours, of the same document or not, as groups may have them. Columns:
mean BM25 over the ordered pairs of a group; the share of tokens whose next token occurs in another member ("positives"); the share of
pairs from one document; seconds without the neighbours.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import time
from functools import partial
from pathlib import Path

import numba
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.packing import groups
from pipeline.packing.bm25 import nearest
from pipeline.packing.bm25.bags import Bags

NEIGHBOURS = 20
CHUNK = 100


def read(data: Path, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [count, length] word numbers and int64 [count], the document that each begins in."""
    vocabulary: dict[str, int] = {}
    words, documents, number = [], [], 0
    for corpus in ("wikipedia", "books"):
        with gzip.open(data / corpus / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                text = [vocabulary.setdefault(word, len(vocabulary)) for word in re.findall(r"\w+|[^\w\s]", json.loads(line)["text"].lower())]
                words.append(np.array(text, dtype=np.int32))
                documents.append(np.full(len(text), number, dtype=np.int32))
                number += 1
    chunk = CHUNK * length
    flat, of = np.concatenate(words), np.concatenate(documents)
    order = np.random.default_rng(0).permutation(len(flat) // chunk)
    if len(order) * CHUNK < count:
        raise SystemExit(f"{data} has {len(order) * CHUNK:,} segments of {length} words, {count:,} are asked for")
    rows = flat[: len(order) * chunk].reshape(len(order), CHUNK, length)[order].reshape(-1, length)
    begins = of[: len(order) * chunk : length].reshape(len(order), CHUNK)[order].reshape(-1)
    return rows[:count], begins[:count].astype(np.int64)


def similarity(bags: Bags, grouped: np.ndarray) -> float:
    """Mean BM25 over the ordered pairs of a group, of full groups."""
    full = grouped[(grouped >= 0).all(axis=1)]
    scores = [bags.score(full[:, place], np.delete(full, place, axis=1)) for place in range(full.shape[1])]
    return float(np.mean(scores, dtype=np.float64))


@numba.njit(cache=True)
def positives(rows, grouped, vocabulary):  # type: ignore[no-untyped-def]
    """The share of tokens, each segment's first left out, that occur in another member of the group."""
    members, last = np.zeros(vocabulary, dtype=np.int64), np.full(vocabulary, -1, dtype=np.int64)
    found = tokens = 0
    for group in grouped:
        group = group[group >= 0]
        for i in group:
            members[rows[i]] = 0
        for i in group:
            for term in rows[i]:
                if last[term] != i:
                    last[term] = i
                    members[term] += 1
        for i in group:
            for term in rows[i, 1:]:
                tokens += 1
                found += members[term] > 1
    return found / max(tokens, 1)


def one_document(documents: np.ndarray, grouped: np.ndarray) -> float:
    full = documents[grouped[(grouped >= 0).all(axis=1)]]
    return ((full[:, :, None] == full[:, None, :]).mean() * full.shape[1] - 1) / (full.shape[1] - 1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--segments", type=int, default=60_000)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--size", type=int, default=8)
    options.add_argument("--threads", type=int, default=1, help="of the neighbour search; groups are made by one")
    given = options.parse_args()
    rows, documents = read(given.data, given.segments, given.length)
    order = np.argsort(documents, kind="stable")
    rows, documents = rows[order], documents[order]
    count, size, bags = given.segments, given.size, Bags.of(rows)
    nobody = np.full((count, 0), -1, dtype=np.int32)  # a walk without neighbours is a random order
    few = np.arange(4 * size)
    print(f"{count:,} segments of {given.length} words, groups of {size}, k={NEIGHBOURS}, groups made by one thread\n")
    print("| policy | search | one document | similarity | positives | pairs of one document | seconds |\n|---|---|---|---|---|---|---|")
    vocabulary = int(rows.max()) + 1
    for rule, apart in (("allowed", None), ("excluded", documents)):
        found = {mode: nearest(bags, NEIGHBOURS, mode=mode, documents=apart, threads=given.threads) for mode in ("exact", "capped")}  # type: ignore[arg-type]
        ids, scores = found["exact"]
        own = None if apart is None else apart[few]
        groups.matching(bags, ids[few] % len(few), scores[few], size, documents=own)  # compiles
        groups.chain(ids[few] % len(few), size, 1, documents=own)
        policies = {
            ("random", ""): partial(groups.chain, nobody, size, 1, documents=apart),
            ("consecutive", ""): partial(groups.consecutive, documents, size, mix_documents=True),
            ("chain", "exact"): partial(groups.chain, ids, size, 1, documents=apart),
            ("matching, no swaps", "exact"): partial(groups.matching, bags, ids, scores, size, documents=apart, passes=0),
            ("matching", "exact"): partial(groups.matching, bags, ids, scores, size, documents=apart),
            ("matching", "capped"): partial(groups.matching, bags, *found["capped"], size, documents=apart),
        }
        for (name, search), policy in policies.items():
            if name == "consecutive" and apart is not None:
                continue
            begun = time.perf_counter()
            grouped = policy()
            seconds = time.perf_counter() - begun
            quality = similarity(bags, grouped), positives(rows, grouped, vocabulary), one_document(documents, grouped)
            print(f"| {name} | {search} | {rule} | {quality[0]:.2f} | {quality[1]:.4f} | {quality[2]:.4f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
