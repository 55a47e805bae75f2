"""What each way of pretraining an encoder costs a step: forward and backward, beside plain masked language modelling.

    python benchmarks/objectives.py [--shape base] [--layers 1 3] [--rows 4] [--repeats 5] [--device cuda --dtype bfloat16]

All ways take turns, so that a busy machine is unfair to none, and see the same made-up rows of full length; the optimiser is left out. On a CPU
times are this process's own (CPU seconds), on a GPU those of the clock. With two numbers of layers they are drawn out in a straight line to those of
the whole shape: what layers cost grows with their number, what the vocabulary costs does not. Ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline import objectives
from pipeline.models import build
from pipeline.models.settings import ModelSettings
from pipeline.models.stopwatch import device_name
from pipeline.objectives.notes import Notes
from pipeline.objectives.settings import ElectraSettings, MetaControllerSettings, MlmSettings, NotesSettings

SHAPES: dict[str, dict[str, Any]] = {
    "base": {"model": {"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072}, "vocabulary": 30522, "length": 512, "rows": 4, "measured": [1, 3]},
    "small": {"model": {"layers": 4, "hidden": 256, "heads": 4, "ffn": 1024}, "vocabulary": 8000, "length": 128, "rows": 32, "measured": [4]},
}
WAYS: dict[str, dict[str, Any]] = {
    "mlm": {},
    "mlm, tupe-relative": {"positions": "tupe-relative"},
    "mlm, notes": {"notes": True},
    "electra": {"objective": ElectraSettings()},
    "meta_controller": {"objective": MetaControllerSettings()},
    "all three": {"objective": MetaControllerSettings(), "positions": "tupe-relative", "notes": True},
}
RARE = 4
"""Rare words of a row, where there are notes: more than the fifth of all sentences that have one (Wu et al. 2021)."""


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *(f"w{number}" for number in range(5, vocabulary))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    roles = {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{f"{role}_token": word for role, word in roles.items()})


def batch_of(vocabulary: int, rows: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Full rows of random tokens, each a word, and what notes ask for."""
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, length), generator=draws)
    ids[:, 0], ids[:, -1] = 2, 3
    word = torch.arange(length).expand(rows, -1) - 1
    word = word.masked_fill((ids == 2) | (ids == 3), -1)
    at = torch.stack([torch.randperm(length - 2, generator=draws)[:RARE] + 1 for _ in range(rows)])
    number = torch.randint(0, 1000, (rows, RARE), generator=draws)
    note = torch.full_like(ids, -1).scatter(1, at, number)
    occurrences = torch.stack([number, at, at + 1, torch.ones_like(at), torch.full_like(at, length - 1)], dim=-1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "segment": torch.arange(rows), "word": word, "note": note}
    return {name: tensor.to(device) for name, tensor in {**batch, "occurrences": occurrences}.items()}


def step_of(way: dict[str, Any], shape: dict[str, Any], layers: int, options: argparse.Namespace, tokenizer: Any) -> Callable[[], None]:
    """One training step, of which nothing is kept but the gradients."""
    device, settings = torch.device(options.device), way.get("objective", MlmSettings())
    positions = way.get("positions", "absolute")
    torch.manual_seed(0)
    model = build.new(
        ModelSettings(**{**shape["model"], "layers": layers}, positions=positions, max_length=shape["length"]), tokenizer, settings.head
    )
    objective = objectives.build(settings, tokenizer, 1, model=model.config)
    if way.get("notes"):
        notes = Notes(NotesSettings(), 1000, model.config.hidden_size, 1).to(device)
        objective.take_notes(notes)
    model, objective = model.to(device).train(), objective.to(device).train()
    batch = objective.prepare(batch_of(shape["vocabulary"], options.rows, shape["length"], device), 0)

    def step() -> None:
        for parameter in (*model.parameters(), *objective.parameters()):
            parameter.grad = None
        if objective.notes is not None:
            objective.notes.before_step(0)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"):
            losses = objective(model, batch, 0)
        sum(objective.loss_weights.get(name, 1.0) * loss for name, loss in losses.items() if name not in objective.figures).backward()
        if objective.notes is not None:
            objective.notes.after_step(0)

    return step


def seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    clock = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - clock


def drawn_out(times: dict[int, float], layers: int) -> float:
    """The line through the times of two numbers of layers, at `layers`; one number: its time."""
    if len(times) == 1:
        return next(iter(times.values()))
    (few, less), (many, more) = sorted(times.items())
    return less + (more - less) * (layers - few) / (many - few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="base", choices=SHAPES)
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of layers to measure: one, or two to draw a line through")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    shape, device = SHAPES[options.shape], torch.device(options.device)
    options.rows, measured = options.rows or shape["rows"], options.layers or shape["measured"]
    full = measured[0] if len(measured) == 1 else shape["model"]["layers"]
    tokenizer = tokenizer_of(shape["vocabulary"])
    steps = {(name, layers): step_of(way, shape, layers, options, tokenizer) for name, way in WAYS.items() for layers in measured}
    rounds: list[dict[str, float]] = []
    for repeat in range(options.repeats + 1):
        times = {key: seconds(step, device) for key, step in steps.items()}
        if repeat:  # the first is warm-up
            rounds.append({name: drawn_out({layers: times[name, layers] for layers in measured}, full) for name in WAYS})

    model = " / ".join(str(shape["model"][key]) for key in ("hidden", "heads", "ffn"))
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {options.dtype}")
    how = f"drawn out to {full} from {measured[0]} and {measured[1]}" if len(measured) == 2 else str(full)
    print(f"{options.shape}: width / heads / ffn {model}, layers {how}, vocabulary {shape['vocabulary']}; {options.rows} rows of {shape['length']}\n")
    print("| way | ms a step | of mlm's | lowest to highest |\n|---|---|---|---|")
    for name in WAYS:
        ratios = [each[name] / each["mlm"] for each in rounds]
        middle = statistics.median(each[name] for each in rounds) * 1e3
        print(f"| {name} | {middle:,.0f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
