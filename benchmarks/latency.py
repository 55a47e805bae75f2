"""Whether a table of single blocks says how fast a pruned encoder is: predicted beside measured.

    python benchmarks/latency.py [--layers 6 --hidden 384 --heads 12 --ffn 1536] [--rows 1 32] [--length 128] [--threads 2] [--sparsity 0.6 0.8 0.95]
        [--repeats 15] [--device cuda]

Encoders of random weights, pruned by random scores: to a sparsity, to a speed-up of as many times (1 / (1 - sparsity)) by the table, and to a
uniform shape of a third of the layers. The time of a model is that of its body less that of one without layers; the models take turns, and the
medians are given. On a CPU the time is that of the calling thread: with one, others' load falls out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as Shown
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.compression import surgery
from pipeline.compression.latency import Table
from pipeline.compression.one_shot import choose
from pipeline.compression.shapes import Shape, to_shape
from pipeline.compression.sparsity import Prunable
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineModel
from pipeline.models.stopwatch import milliseconds

Masks = dict[str, Tensor]


def pruned(prunable: Prunable, table: Table, sparsities: list[float]) -> dict[str, Masks]:
    """What is timed, by name."""
    generator = torch.Generator().manual_seed(0)
    scores = {unit: torch.rand(shape, generator=generator) for unit, shape in prunable.shapes.items()}
    fine = {unit: scores[unit] / scores[unit].norm(dim=-1, keepdim=True) for unit in ("heads", "neurons")}
    found: dict[str, Masks] = {"dense": {unit: torch.ones(prunable.shapes[unit]) for unit in fine}}
    for sparsity in sparsities:
        found[f"{sparsity:.0%} of parameters gone"] = choose(fine, prunable.sparsity, sparsity)
        found[f"{1 / (1 - sparsity):.3g} times as fast"] = choose(fine, table.saved, sparsity)
    shape = Shape(max(1, prunable.layers // 3), max(1, prunable.heads // 4), max(8, prunable.ffn // 8), prunable.hidden)
    found[f"{shape.layers} layers of {shape.heads} heads, {shape.ffn} neurons"] = to_shape(scores, shape, prunable)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("layers", 6), ("hidden", 384), ("heads", 12), ("ffn", 1536), ("length", 128), ("threads", None), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.6, 0.8, 0.95])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    config = TrimlineConfig(
        vocab_size=0,
        pad_token_id=None,
        hidden_size=given.hidden,
        head_dim=given.hidden // given.heads,
        heads_per_layer=[given.heads] * given.layers,
        ffn_per_layer=[given.ffn] * given.layers,
        max_position_embeddings=given.length,
    )
    prunable, dense = Prunable.of(config), TrimlineModel(config, add_pooling_layer=False).eval()
    for rows in given.rows:
        table = Table.measure(config, rows=rows, length=given.length, device=device, threads=given.threads, repeats=given.repeats)
        models = pruned(prunable, table, given.sparsity)
        x = torch.randn(rows, given.length, given.hidden, device=device)
        nothing = {unit: torch.zeros(prunable.shapes[unit]) for unit in ("heads", "neurons")}
        calls: dict[str, Callable[[], object]] = {
            name: partial(surgery.remove(dense, masks).to(device), inputs_embeds=x) for name, masks in {**models, "": nothing}.items()
        }
        with torch.inference_mode():
            times, threads = milliseconds(calls, given.repeats, device, given.threads, time.thread_time)
        measured = {name: statistics.median(taken) - statistics.median(times[""]) for name, taken in times.items()}
        shown = Shown("model", "predicted, ms", "measured, ms", "predicted / measured", "speed-up predicted", "measured")
        for name, masks in models.items():
            predicted = table.time(masks).item()
            speed_ups = f"{table.speed_up(masks).item():.1f}x", f"{measured['dense'] / measured[name]:.1f}x"
            shown.add_row(name, f"{predicted:.2f}", f"{measured[name]:.2f}", f"{predicted / measured[name]:.2f}", *speed_ups)
        shown.title = f"{rows} rows of {given.length} on {table.device}" + (f", {threads} threads" if threads else "")
        Console().print(shown)


if __name__ == "__main__":
    main()
