"""All-pairs BM25 neighbours beside bm25s (numba and numpy), tantivy and sparse_dot_topn: the same rows, k = 20, one thread.

    python benchmarks/bm25.py --data DIR [--only 256x20000,256x60000,...] [--tokens 60000] [--million 1000000]

DIR holds wikipedia/train.jsonl.gz and books/train.jsonl.gz, a {"text": ...} a line. Rows are runs of lower-case words, in chunks of 100
neighbours that are shuffled (see groups.py); with --tokens also runs of ids of a SentencePiece model trained here; with --million so many
rows resampled from the words of three neighbouring ones, planned whole (neighbours, near-duplicates, groups of 8) on all cores.

Each engine runs in a process of its own. Ours searches for every row, the others for a sample of them. Columns: seconds to index; rows
searched a second of CPU time; the same as a multiple of bm25s-numba's; peak memory beyond the rows' own; recall of the exact 20
neighbours, counted by score; the largest relative difference of a score from ours. tantivy has its own k1 and b, so its recall says little.
The exponent is that of the whole time, index and search, from the smaller number of rows of a length to the larger.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"), "1")

import numpy as np  # noqa: E402
from groups import read  # noqa: E402

from pipeline.packing import bm25  # noqa: E402

K = 20
K1, B = 0.9, 0.4
SETTINGS = ((256, 20_000), (256, 60_000), (64, 60_000), (64, 240_000))
SAMPLES = {"bm25s-numba": 2000, "bm25s-numpy": 500, "tantivy": 200, "sparse_dot_topn": 2000}
OURS = ("exact", "pruned", "capped")
Found = tuple[np.ndarray, np.ndarray]
Engine = Callable[[np.ndarray], tuple[Callable[[np.ndarray], Found], Any]]


def ours(mode: str) -> Engine:
    from pipeline.packing.bm25 import nearest
    from pipeline.packing.bm25.bags import Bags

    def index(rows: np.ndarray) -> tuple[Callable[[np.ndarray], Found], Any]:
        bags = Bags.of(rows, k1=K1, b=B)
        return lambda queries: nearest(bags, K, mode=mode, threads=1), bags  # type: ignore[arg-type]

    return index


def bm25s(backend: str) -> Engine:
    def index(rows: np.ndarray) -> tuple[Callable[[np.ndarray], Found], Any]:
        import bm25s

        engine = bm25s.BM25(method="lucene", k1=K1, b=B, backend=backend)
        vocabulary = {str(term): term for term in range(int(rows.max()) + 1)}
        engine.index((rows.tolist(), vocabulary), show_progress=False)
        if backend == "numba":
            engine.activate_numba_scorer()

        def search(queries: np.ndarray) -> Found:
            ids, scores = engine.retrieve(
                rows[queries].tolist(), k=K + 1, show_progress=False, n_threads=0, backend_selection="numba" if backend == "numba" else "auto"
            )
            return without_self(queries, ids, scores)

        return search, engine

    return index


def tantivy(rows: np.ndarray) -> tuple[Callable[[np.ndarray], Found], Any]:
    import tantivy as engine

    builder = engine.SchemaBuilder()
    builder.add_text_field("terms", tokenizer_name="whitespace")
    builder.add_integer_field("id", stored=True)
    schema = builder.build()
    index = engine.Index(schema)
    index.register_tokenizer("whitespace", engine.TextAnalyzerBuilder(engine.Tokenizer.whitespace()).build())
    writer = index.writer(heap_size=500_000_000, num_threads=1)
    for number, row in enumerate(rows):
        writer.add_document(engine.Document(terms=" ".join(map(str, row)), id=number))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()

    def search(queries: np.ndarray) -> Found:
        ids, scores = np.full((len(queries), K + 1), -1), np.zeros((len(queries), K + 1), dtype=np.float32)
        for place, query in enumerate(queries):
            terms, counts = np.unique(rows[query], return_counts=True)
            clauses = [
                (engine.Occur.Should, engine.Query.boost_query(engine.Query.term_query(schema, "terms", str(term)), float(count)))
                for term, count in zip(terms, counts, strict=True)
            ]
            hits = searcher.search(engine.Query.boolean_query(clauses), K + 1).hits
            for rank, (score, address) in enumerate(hits):
                ids[place, rank], scores[place, rank] = searcher.doc(address)["id"][0], score
        return without_self(queries, ids, scores)

    return search, searcher


def sparse_dot_topn(rows: np.ndarray) -> tuple[Callable[[np.ndarray], Found], Any]:
    from scipy import sparse
    from sparse_dot_topn import sp_matmul_topn

    from pipeline.packing.bm25.bags import Bags

    bags = Bags.of(rows, k1=K1, b=B)
    counts = bags.counts.astype(np.float32)
    weights = bags.idf[bags.terms] * (counts / (counts + np.repeat(bags.norms, np.diff(bags.offsets))))
    shape, terms = (len(bags), len(bags.idf)), bags.terms.astype(np.int32)
    queries_of = sparse.csr_matrix((counts, terms, bags.offsets), shape=shape)
    documents = sparse.csr_matrix((weights, terms, bags.offsets), shape=shape).T.tocsr()

    def search(queries: np.ndarray) -> Found:
        found = sp_matmul_topn(queries_of[queries], documents, top_n=K + 1, sort=True, n_threads=1)
        ids, scores = np.full((len(queries), K + 1), -1), np.zeros((len(queries), K + 1), dtype=np.float32)
        place = np.repeat(np.arange(len(queries)), np.diff(found.indptr))
        rank = np.arange(len(found.indices)) - found.indptr[place]
        ids[place, rank], scores[place, rank] = found.indices, found.data
        return without_self(queries, ids, scores)

    return search, documents


ENGINES: dict[str, Callable[[], Engine]] = {
    **{mode: lambda mode=mode: ours(mode) for mode in OURS},  # type: ignore[misc]
    "bm25s-numba": lambda: bm25s("numba"),
    "bm25s-numpy": lambda: bm25s("numpy"),
    "tantivy": lambda: tantivy,
    "sparse_dot_topn": lambda: sparse_dot_topn,
}


def without_self(queries: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> Found:
    """K neighbours of K + 1 that may hold the query itself."""
    order = np.argsort(ids == queries[:, None], axis=1, kind="stable")[:, :K]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


def measure(name: str, file: Path, out: Path) -> None:
    """In a process of its own: one engine on the rows of a file."""
    rows = np.load(file)
    queries = (
        np.arange(len(rows)) if name in OURS else np.sort(np.random.default_rng(1).choice(len(rows), min(SAMPLES[name], len(rows)), replace=False))
    )
    engine = ENGINES[name]()
    warm, _ = engine(rows[:3000])  # compiles; ours the search in clusters too, which needs many rows or a low cap
    cap, bm25.CAP = bm25.CAP, 512
    warm(np.arange(50))
    bm25.CAP = cap
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    begun = time.process_time()
    search, kept = engine(rows)
    indexed = time.process_time()
    ids, scores = search(queries)
    done = time.process_time()
    np.savez(out, ids=ids, scores=scores, queries=queries, index=indexed - begun, search=done - indexed, peak=memory("VmHWM") - before)
    del kept


def memory(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most since the peak was reset."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)) / 1024


def run(name: str, file: Path, out: Path) -> dict[str, np.ndarray]:
    subprocess.run([sys.executable, __file__, "--engine", name, str(file), str(out)], env={**os.environ, **ONE_THREAD}, check=True)
    with np.load(out) as found:
        return dict(found)


def compare(title: str, rows: np.ndarray, engines: list[str], folder: Path, totals: dict[tuple[str, str], dict[int, float]]) -> None:
    file = folder / "rows.npy"
    np.save(file, rows)
    found = {name: run(name, file, folder / f"{name}.npz") for name in engines}
    rate = {name: len(result["queries"]) / float(result["search"]) for name, result in found.items()}
    exact = found["exact"]
    print(f"\n{title}, {len(rows):,} rows\n")
    print(f"| engine | index s | rows/s | of bm25s-numba | MiB | recall@{K} | scores differ |\n|---|---|---|---|---|---|---|")
    for name, result in found.items():
        threshold = exact["scores"][result["queries"], K - 1 : K]
        exact_ids = exact["ids"][result["queries"]]
        same_ids = result["ids"] == exact_ids
        truth = exact["scores"][result["queries"]]
        own_formula = name != "tantivy"
        recall = np.mean((result["ids"] >= 0) & (result["scores"] >= threshold * (1 - 1e-4))) if own_formula else overlap(result["ids"], exact_ids)
        differ = f"{np.max(np.abs(result['scores'] - truth)[same_ids] / truth[same_ids], initial=0):.0e}" if own_formula else ""
        total = float(result["index"]) + len(rows) / rate[name]
        totals.setdefault((title, name), {})[len(rows)] = total
        print(
            f"| {name} | {float(result['index']):.2f} | {rate[name]:,.0f} | {rate[name] / rate['bm25s-numba']:.1f} | {float(result['peak']):,.0f}"
            f" | {recall:.4f} | {differ} |",
            flush=True,
        )


def overlap(ids: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(ids, truth, strict=True)]))


def exponents(totals: dict[tuple[str, str], dict[int, float]]) -> None:
    print("\n| rows | engine | from | to | exponent |\n|---|---|---|---|---|")
    for (title, name), times in totals.items():
        for (small, before), (large, after) in zip(list(times.items())[:-1], list(times.items())[1:], strict=True):
            print(f"| {title} | {name} | {small:,} | {large:,} | {math.log(after / before) / math.log(large / small):.2f} |")


def sentencepiece_rows(data: Path, count: int, length: int, folder: Path) -> np.ndarray:
    """int32 [count, length] ids of a unigram model of 16,000 pieces."""
    import gzip

    import sentencepiece

    texts = []
    for corpus in ("wikipedia", "books"):
        with gzip.open(data / corpus / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts += [paragraph for line in lines for paragraph in json.loads(line)["text"].split("\n") if paragraph.strip()]
    (folder / "text").write_text("\n".join(texts[:: max(len(texts) // 100_000, 1)]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text"), model_prefix=str(folder / "model"), vocab_size=16_000, minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "model.model"))
    ids = np.concatenate([np.array(part, dtype=np.int32) for part in model.encode(texts)])
    chunks = np.random.default_rng(0).permutation(len(ids) // (100 * length))
    return ids[: len(chunks) * 100 * length].reshape(len(chunks), 100 * length)[chunks].reshape(-1, length)[:count]


def resampled(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows of words drawn from a row and its two neighbours: as many different rows as asked for, with the words' frequencies as they are."""
    draw, length = np.random.default_rng(3), rows.shape[1]
    out = np.empty((count, length), dtype=np.int32)
    for first in range(0, count, 50_000):
        here = np.arange(first, min(first + 50_000, count)) * len(rows) // count
        near = (here[:, None] + draw.integers(-1, 2, (len(here), length))) % len(rows)
        out[here[0] * 0 + first : first + len(here)] = rows[near, draw.integers(0, length, (len(here), length))]
    return out


def plan(rows: np.ndarray) -> None:
    """A plan of all the rows with the recipe's defaults, on all cores."""
    from pipeline.launch.ranks import Ranks
    from pipeline.packing import groups, near_duplicates
    from pipeline.packing.bm25 import nearest
    from pipeline.packing.bm25.bags import Bags

    threads = Ranks().threads
    small = Bags.of(rows[:3000])
    cap, bm25.CAP = bm25.CAP, 512
    groups.matching(small, *nearest(small, K, mode="capped"), 8)  # compiles
    bm25.CAP = cap
    clock = [time.perf_counter()]
    bags = Bags.of(rows, threads=threads)
    clock.append(time.perf_counter())
    ids, scores = nearest(bags, K, mode="capped", threads=threads)
    clock.append(time.perf_counter())
    pairs, copies = near_duplicates.pairs(bags, ids, 0.8), near_duplicates.exact(bags)
    removed = near_duplicates.removed(len(bags), pairs, copies)
    clock.append(time.perf_counter())
    grouped = groups.matching(bags, ids, scores, 8)
    clock.append(time.perf_counter())
    from groups import similarity

    steps = " + ".join(
        f"{b - a:.0f} {name}" for name, a, b in zip(("index", "neighbours", "near-duplicates", "groups"), clock[:-1], clock[1:], strict=True)
    )
    some = grouped[:: max(len(grouped) // 5000, 1)]
    print(
        f"\n{len(rows):,} rows of {rows.shape[1]} planned on {threads} threads in {(clock[-1] - clock[0]) / 60:.1f} minutes (seconds: {steps});"
        f" peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB with the rows;"
        f" {removed.sum():,} near-duplicates; BM25 inside groups {similarity(bags, some):.1f}",
        flush=True,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path)
    options.add_argument(
        "--only", default=",".join(f"{length}x{count}" for length, count in SETTINGS), help="lengths and numbers of rows; empty for none"
    )
    options.add_argument("--tokens", type=int, default=0, help="rows of 256 SentencePiece ids, 0 for none")
    options.add_argument("--million", type=int, default=0, help="rows to plan, 0 for none")
    options.add_argument("--engines", default=",".join(ENGINES))
    options.add_argument("--engine", nargs=3, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.engine:
        measure(given.engine[0], Path(given.engine[1]), Path(given.engine[2]))
        return
    if given.data is None:
        options.error("--data DIR is needed: the folder that holds wikipedia and books")
    engines = given.engines.split(",")
    totals: dict[tuple[str, str], dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for setting in filter(None, given.only.split(",")):
            length, count = map(int, setting.split("x"))
            compare(f"{length} words", read(given.data, count, length)[0], engines, folder, totals)
        if given.tokens:
            for count in (given.tokens // 3, given.tokens):
                compare("256 SentencePiece ids", sentencepiece_rows(given.data, count, 256, folder), engines, folder, totals)
        if totals:
            exponents(totals)
    if given.million:
        plan(resampled(read(given.data, 60_000, 256)[0], given.million))


if __name__ == "__main__":
    main()
