"""TRIME's loss, time and memory: the formula in plain PyTorch beside ours, dense and in chunks.

    python benchmarks/trime_loss.py [--device cuda] [--dtype bfloat16] [--rows 8192 --vocabulary 32000 --width 512 --chunks 128 256 512]

Forward and backward from hidden states, output embedding, queries and keys, each query seeing all entries before it. Every variant runs in a
process of its own; peak memory is what it holds beyond its inputs (on a GPU what PyTorch allocates), time the median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.models.stopwatch import device_name
from pipeline.objectives.trime import trime_loss, trime_loss_of_states

FORMULA = "formula"


def formula(hidden: Tensor, embedding: Tensor, targets: Tensor, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Equation 5 as one writes it down."""
    logits = (hidden @ embedding.T).float()
    scores = ((queries @ keys.T).float() * queries.shape[1] ** -0.5).masked_fill(~visible, -torch.inf)
    matching = scores.masked_fill(values != targets[:, None], -torch.inf)
    partition = torch.logsumexp(torch.cat([logits, scores], dim=1), dim=1)
    return partition - torch.logsumexp(torch.cat([logits.gather(1, targets[:, None]), matching], dim=1), dim=1)


def measure(options: argparse.Namespace, variant: str) -> dict[str, float]:
    """Seconds and peak bytes of one variant, its loss, and the norms of the gradients, in this process."""
    device, dtype, n, d = torch.device(options.device), getattr(torch, options.dtype), options.rows, options.width
    torch.manual_seed(0)
    hidden, queries, keys = (torch.randn(n, d, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    embedding = (torch.randn(options.vocabulary, d, device=device, dtype=dtype) * d**-0.5).requires_grad_()
    targets, values = (torch.randint(options.vocabulary, (n,), device=device) for _ in range(2))
    index = torch.arange(n, device=device)

    def rows(start: int, stop: int) -> Tensor:
        return index < index[start:stop, None]

    def loss() -> Tensor:
        if variant == FORMULA:
            return formula(hidden, embedding, targets, queries, keys, values, rows(0, n))
        if variant == "dense":
            return trime_loss(hidden @ embedding.T, targets, queries, keys, values, rows)
        return trime_loss_of_states(hidden, embedding, targets, queries, keys, values, rows, chunk=int(variant))

    before = _held(device)
    times: list[float] = []
    with _Peak(device) as peak:
        for _ in range(options.repeats):
            for tensor in (hidden, embedding, queries, keys):
                tensor.grad = None
            _wait(device)
            start = time.perf_counter()
            found = loss().mean()
            found.backward()
            _wait(device)
            times.append(time.perf_counter() - start)
    norms = {name: float(tensor.grad.float().norm()) for name, tensor in (("hidden", hidden), ("embedding", embedding), ("keys", keys))}  # type: ignore[union-attr]
    return {"seconds": statistics.median(times), "bytes": peak.bytes - before, "loss": found.item(), **norms}


class _Peak:
    """The most memory held inside the block."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> _Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, _held(self.device))

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._over.set()
        self._watch.join()


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=8192, help="queries, and entries of the memory")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options, options.variant)))
        return
    found = {}
    for variant in (FORMULA, "dense", *map(str, options.chunks)):
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--variant", variant], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{variant}: {done.stderr.strip().splitlines()[-1]}")
        found[variant] = json.loads(done.stdout.strip().splitlines()[-1])
    peer = found[FORMULA]
    print(f"{device_name(torch.device(options.device))}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}")
    print(f"{options.rows} queries x {options.rows} entries, vocabulary {options.vocabulary}, width {options.width}; forward and backward\n")
    print("| variant | seconds | of the formula's | peak MiB | of the formula's | loss | gradient of the keys |")
    print("|---|---|---|---|---|---|---|")
    for variant, figures in found.items():
        name = f"chunks of {variant}" if variant.isdecimal() else {FORMULA: "the formula in PyTorch", "dense": "trime_loss, dense"}[variant]
        times, memory = figures["seconds"] / peer["seconds"], figures["bytes"] / peer["bytes"]
        values = f"{figures['loss']:.5f} | {figures['keys']:.6g}"
        print(f"| {name} | {figures['seconds']:.2f} | {times:.2f} | {figures['bytes'] / 2**20:,.0f} | {memory:.1%} | {values} |")


if __name__ == "__main__":
    main()
