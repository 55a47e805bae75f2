"""The loader beside datatrove's dataset and a torch DataLoader: the same tokens, the same rows, shuffled, on one core.

    python benchmarks/loader.py [--data PATH] [--tokens 50000000]

Rows of 512, then of 2048 tokens, 64 a batch. The tokens are random, in a temporary folder and in the page cache; documents are as long as
a web corpus's, or as those of PATH. Contenders take turns of 300 batches, forwards and backwards; the best of the repetitions counts. Padding
is not counted as tokens. CPU time is the process's own and its workers', so that a busy machine disturbs it little. Memory is the most that
batches take, in private and shared pages (not the token files'), in a process of its own. All give int64 `input_ids`; ours `attention_mask` too.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"))

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.corpus import documents
from pipeline.corpus.settings import Source
from pipeline.corpus.store import Store, Writer
from pipeline.packing import plan
from pipeline.packing.loader import Loader
from pipeline.packing.settings import PackSettings

ROWS = 64
LENGTHS = (512, 2048)
SHARDS = 8
BATCHES = 300
REPETITIONS = 7
TOKENIZER: Any = SimpleNamespace(
    **{f"{role}_token_id": number for number, role in enumerate(("pad", "unk", "bos", "eos", "mask", "cls", "sep"))}, get_vocab=dict
)
PLANS = {
    "Trimline": PackSettings(length=512),
    "Trimline, groups of 8": PackSettings(length=512, groups="consecutive", group_size=8, mix_documents=True),
    "Trimline, rows within documents": PackSettings(length=512, segments="within"),
}
Batches = Callable[[], Iterable[torch.Tensor]]


@dataclass
class Contender:
    """batches: starts an epoch of `input_ids` [B, L], of which `filled` is not padding. The least seconds a turn took, and memory in bytes."""

    name: str
    batches: Batches
    filled: float = 1.0
    tokens: float = 0
    cpu: float = field(default=float("inf"))
    wall: float = field(default=float("inf"))
    memory: int = 0


class Rows(Dataset[torch.Tensor]):
    """What one writes for a memory map of tokens: rows of a fixed length."""

    def __init__(self, file: Path, length: int):
        self.tokens, self.length = np.memmap(file, dtype=np.uint16, mode="r"), length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.tokens[row * self.length : (row + 1) * self.length].astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="text whose documents' lengths are taken (4 bytes a token): a folder, file or glob, as a recipe's source")
    parser.add_argument("--tokens", type=int, default=50_000_000, help="size of the token store")
    arguments = parser.parse_args()
    if arguments.tokens < 10**6:
        parser.error(f"--tokens {arguments.tokens}: give at least 1000000, some batches of the longest rows")
    try:
        from datatrove.pipeline.tokens.tokenizer import TokenizedFile
    except ImportError as error:
        sys.exit(f"benchmarks/loader.py compares with datatrove, which is not here ({error}); pip install 'trimline[bench]'")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = document_lengths(arguments.data, arguments.tokens)
        theirs = TokenizedFile(str(folder), "tokens.ds")
        draw = np.random.default_rng(0)
        for number, part in enumerate(np.array_split(lengths, SHARDS)):
            with Writer(folder / f"{number:05d}", np.uint16) as writer:
                for length in part:
                    tokens = draw.integers(8, 50_000, length, dtype=np.uint16)
                    writer.add(tokens)
                    theirs.write_bytes(tokens.tobytes())
        theirs.close()
        print(f"{lengths.sum():,} tokens in {len(lengths):,} documents, {SHARDS} shards; {ROWS} rows a batch; best of {REPETITIONS}; one core\n")
        print("| rows of | | M tokens/s of CPU time | M tokens/s of wall time | ours to it | memory, MiB |\n|---|---|---|---|---|---|")
        for length in LENGTHS:
            report(length, measured(contenders(folder, length)))


def document_lengths(data: str | None, tokens: int) -> np.ndarray:
    """int64 [documents], `tokens` in all or just beyond: log-normal with a mean of 490 and a median of 270, or those of the text, repeated."""
    if data is None:
        lengths = np.random.default_rng(1).lognormal(5.6, 1.1, tokens // 200).clip(8, 100_000).astype(np.int64)
    else:
        found = documents.read(Source(path=f"{data}/*" if Path(data).is_dir() else data))
        lengths = np.array([len(document.text.encode()) // 4 + 1 for document in found])
        lengths = np.resize(lengths, len(lengths) * (tokens // lengths.sum() + 1))
    return lengths[: np.searchsorted(np.cumsum(lengths), tokens) + 1]


def contenders(folder: Path, length: int) -> list[Contender]:
    from datatrove.utils.dataset import DatatroveFileDataset

    store = Store.open(folder)
    found = []
    for name, settings in PLANS.items():
        made = plan.make(tempfile.mkdtemp(dir=folder), settings.model_copy(update={"length": length}), "decoder", store, TOKENIZER)
        found.append(ours(name, Loader(made, store, TOKENIZER, ROWS, seed=1)))
        if name == "Trimline":
            found.append(ours("Trimline, document mask", Loader(made, store, TOKENIZER, ROWS, seed=1, document_mask=True)))
            plain = made
    rows, windows = Rows(folder / "tokens.ds", length), DatatroveFileDataset(str(folder / "tokens.ds"), length - 1)  # it adds one to a length
    for row in (0, 1, len(rows) // 2, len(rows) - 1):
        mine = torch.from_numpy(Loader(plain, store, TOKENIZER, ROWS, seed=1).rows(np.array([row]))["input_ids"][0])
        for theirs in (rows[row], windows[row]["input_ids"]):
            assert torch.equal(mine, theirs)
    in_batches: dict[str, Any] = {"batch_size": ROWS, "shuffle": True, "drop_last": True}
    return [
        *found,
        Contender(
            "datatrove, rows stacked", lambda: (torch.stack([windows[row]["input_ids"] for row in part.tolist()]) for part in shuffled(windows))
        ),
        Contender("datatrove, in a DataLoader", lambda: (batch["input_ids"] for batch in DataLoader(windows, **in_batches))),
        Contender("torch DataLoader over a memory map", lambda: DataLoader(rows, **in_batches)),
        Contender("the same, 1 worker", lambda: DataLoader(rows, num_workers=1, **in_batches)),
    ]


def shuffled(rows: Any) -> tuple[torch.Tensor, ...]:
    return torch.randperm(len(rows) // ROWS * ROWS).split(ROWS)


def ours(name: str, loader: Loader) -> Contender:
    steps = itertools.count()
    return Contender(name, lambda: (torch.from_numpy(loader.batch(step)["input_ids"]) for step in steps), loader.plan.description["fill_rate"])


def measured(found: list[Contender]) -> list[Contender]:
    for repetition in range(REPETITIONS):
        for contender in found[:: -1 if repetition % 2 else 1]:
            cpu, wall = cpu_seconds(), time.perf_counter()
            contender.tokens = contender.filled * sum(batch.numel() for batch in itertools.islice(contender.batches(), BATCHES))
            contender.cpu = min(contender.cpu, cpu_seconds() - cpu)
            contender.wall = min(contender.wall, time.perf_counter() - wall)
    fork = multiprocessing.get_context("fork")
    for contender in found:
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=lambda batches=contender.batches, sender=sender: sender.send(most_memory(batches)))
        process.start()
        contender.memory = receiver.recv()
        process.join()
    return found


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def most_memory(batches: Batches) -> int:
    """The most bytes of private and shared memory that 100 batches take above what is there before, looked at after each."""
    before, most = memory_now(), 0
    for _ in itertools.islice(batches(), 100):
        most = max(most, memory_now() - before)
    return most


def memory_now() -> int:
    """Of this process and its children; a page that several have counts in parts."""
    processes = ["self", *Path("/proc/thread-self/children").read_text().split()]
    lines = (line.split() for process in processes for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines())
    return sum(int(line[1]) << 10 for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:"))


def report(length: int, found: list[Contender]) -> None:
    best = found[0].tokens / found[0].cpu
    for each in found:
        cpu, wall = each.tokens / each.cpu, each.tokens / each.wall
        print(f"| {length} | {each.name} | {cpu / 1e6:.0f} | {wall / 1e6:.0f} | {best / cpu:.1f} | {each.memory / 2**20:.1f} |", flush=True)


if __name__ == "__main__":
    main()
