"""TRIME's tables in small: every training objective with every memory at test, at equal steps and data.

    python benchmarks/trime.py --data DIR [--work DIR] [--tokens 1000000] [--seeds 1 2] [--group-size 8] [--batch 16] [--arms plain trimelm ...]

DIR holds wikipedia/train.jsonl.gz and books/train.jsonl.gz, a {"text": ...} a line. Every arm is a recipe, trained by `trimline pretrain` for one
epoch of the same segments; what an earlier call has made in the work directory is used again. Arms: plain (random batches), consecutive (plain,
in long's order), trimelm, long, long-stopped (no gradient to keys of other segments), ext (BM25 groups, p 0.9), ext-random, ext-p0, ext-p0.1,
ext-p0.5, ext-p1.

Held-out documents are cut after 1,536 tokens, so that none of them is the result; a third of them serves to tune temperatures, biases and
weights, the rest is the test. Windows of one segment, long memory over document borders. Errors are of paired differences over blocks of 1,024
tokens: of the text, not of training. A star says that a tuned value lies on the edge of its grid. The checks are those that 1 M tokens can show;
--no-external leaves the datastore out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from trime_arms import (
    ARMS,
    LENGTH,
    LONG,
    SIZES,
    STORED,
    Arm,
    Row,
    arms_of,
    measure,
    own_prefix,
    prepare,
    results_of,
    train,
    training_speed,
    with_store,
)

from pipeline.evaluation import memories
from pipeline.evaluation.paired import paired
from pipeline.models.stopwatch import device_name

# -- tables ------------------------------------------------------------------------------------------------------------


def ppl(result: memories.Result) -> str:
    star = "*" if result.warnings else ""
    return f"{math.exp(result.loss):.1f}{star}"


def table(head: list[str], rows: list[list[str]]) -> None:
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def average(found: dict[Arm, Row], name: str, memory: str) -> str:
    """Perplexity of the mean loss over seeds, and the standard deviation of the loss where there are several."""
    results = [row[memory] for arm, row in found.items() if arm.name == name and memory in row]
    if not results:
        return ""
    losses = [result.loss for result in results]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{math.exp(statistics.mean(losses)):.1f}{'*' if any(result.warnings for result in results) else ''}{spread}"


class Compared:
    """Paired differences of one seed or over all: mean in nats, standard error of the text, and each seed's own."""

    def __init__(self, found: dict[Arm, Row]):
        self.found = found

    def __call__(self, one: tuple[str, str], other: tuple[str, str]) -> tuple[float, float, list[float]] | None:
        by_seed = []
        for arm, row in self.found.items():
            against = next((r for a, r in self.found.items() if a.name == other[0] and a.seed == arm.seed), None)
            if arm.name == one[0] and against is not None and one[1] in row and other[1] in against:
                by_seed.append((row[one[1]].losses, against[other[1]].losses))
        if not by_seed:
            return None
        mean, error = paired(np.mean([a for a, _ in by_seed], axis=0), np.mean([b for _, b in by_seed], axis=0))
        return mean, error, [float((a - b).mean()) for a, b in by_seed]


PAIRS = (
    (("plain", "cache"), ("plain", "none")),
    (("plain", "cache+1024"), ("plain", "none")),
    (("trimelm", "local"), ("plain", "none")),
    (("trimelm", "local"), ("plain", "cache")),
    (("trimelm", "local"), ("plain", "local")),
    (("trimelm", "none"), ("plain", "none")),
    (("trimelm", "+512"), ("plain", "cache+512")),
    (("long", "+1024"), ("long", "local")),
    (("long", "+1024"), ("plain", "cache+1024")),
    (("long", "+1024 bias"), ("plain", "cache+1024")),
    (("long", "+1024"), ("consecutive", "cache+1024")),
    (("long", "+8192"), ("plain", "cache+8192")),
    (("long", "+8192 bias"), ("plain", "cache+8192")),
    (("long", "+2048"), ("trimelm", "+2048")),
    (("long", "+8192"), ("trimelm", "+8192")),
    (("long", "+1024 bias"), ("trimelm", "+1024 bias")),
    (("long", "+8192 bias"), ("trimelm", "+8192 bias")),
    (("long", "local"), ("trimelm", "local")),
    (("consecutive", "none"), ("plain", "none")),
    (("long", "none"), ("consecutive", "none")),
    (("long-stopped", "local"), ("long", "local")),
    (("long-stopped", "+1024"), ("long", "+1024")),
    (("long-stopped", "+8192"), ("long", "+8192")),
    (("ext", "+2048 bias"), ("ext-random", "+2048 bias")),
)
STORE_PAIRS = (
    (("plain", "knn"), ("plain", "none")),
    (("plain", "external"), ("plain", "none")),
    (("ext", "local+long+external"), ("ext", "local+long")),
    (("trimelm", "local+long+external"), ("trimelm", "local+long")),
    (("ext", "local+long+external, interpolated"), ("plain", "knn+cache+long")),
    (("long", "local+long+external, interpolated"), ("plain", "knn+cache+long")),
    (("ext", "local+long+external, interpolated"), ("long", "local+long+external, interpolated")),
    (("ext", "local+long+external, interpolated"), ("ext-random", "local+long+external, interpolated")),
)


def pairs(compared: Compared, which: Any) -> None:
    rows = []
    for one, other in which:
        if (difference := compared(one, other)) is not None:
            mean, error, seeds = difference
            each = " ".join(f"{math.expm1(seed):+.1%}" for seed in seeds)
            rows.append([f"{' '.join(one)} vs {' '.join(other)}", f"{mean:+.3f} ± {error:.3f}", f"{math.expm1(mean):+.1%}", each])
    table(["first vs second (negative: first is better)", "nats ± se of the text", "perplexity", "by seed"], rows)


def checks(found: dict[Arm, Row], stored: dict[Arm, Row], speed: dict[str, float], tokens: int) -> None:
    """What a correct implementation shows at about 1 M tokens, with the marks that an independent prototype set."""
    compared, rows = Compared(found), []

    def check(what: str, mark: str, value: float | None, holds: Callable[[float], bool], style: str = "+.1%") -> None:
        if value is not None and not math.isnan(value):
            rows.append([what, mark, format(value, style), "yes" if holds(value) else "NO"])

    def change(one: tuple[str, str], other: tuple[str, str], source: Compared = compared) -> float | None:
        difference = source(one, other)
        return None if difference is None else math.expm1(difference[0])

    check("1. trimelm local vs plain + cache local", "-5 % or lower", change(("trimelm", "local"), ("plain", "cache")), lambda v: v <= -0.05)
    check("1. plain + cache local vs plain", "lower", change(("plain", "cache"), ("plain", "none")), lambda v: v < 0)
    check("2. trimelm without memory vs plain", "within about 3 %", change(("trimelm", "none"), ("plain", "none")), lambda v: abs(v) <= 0.035)
    first = next((arm for arm in found if arm.name == "trimelm"), None)
    plain = next((arm for arm in found if arm.name == "plain"), None)
    if first is not None and plain is not None:
        row = found[first]
        temperature = row["local"].values["temperature"]
        check("3. best temperature of trimelm local", "0.93 to 1.07", temperature, lambda v: 0.93 <= v <= 1.07, ".2f")
        position, seen = own_prefix(results_of(first, ("none",), tokens=tokens))
        gain = row["local, temperature 1"].losses - found[plain]["none"].losses
        check("4. nats gained on targets in the own prefix", "0.8 or more", -gain[seen].mean(), lambda v: v >= 0.8, ".2f")
        check("4. nats paid on the others", "0 to 0.25", gain[~seen].mean(), lambda v: 0 <= v <= 0.25, ".3f")
        alone = np.abs(row["local, temperature 1"].losses - row["none"].losses)[position == 0].max()
        check("5. nats between local and none at position 0", "0, but for rounding", alone, lambda v: v < 1e-5, ".1g")
        fall = row["local"].losses[(position >= 80) & (position < 112)].mean() - row["local"].losses[position < 16].mean()
        check("5. loss of trimelm at positions 80-111 against 0-15", "lower", fall, lambda v: v < 0, "+.2f")
    check("6. long +1024 vs its own local", "-30 to -40 %", change(("long", "+1024"), ("long", "local")), lambda v: -0.45 <= v <= -0.25)
    check("6. long +1024 vs plain + cache", "about -10 %", change(("long", "+1024"), ("plain", "cache+1024")), lambda v: v <= -0.03)
    check("7. long vs trimelm, +2048, no bias", "lower", change(("long", "+2048"), ("trimelm", "+2048")), lambda v: v < 0)
    check("7. long vs trimelm, +8192, no bias", "lower", change(("long", "+8192"), ("trimelm", "+8192")), lambda v: v < 0)
    check("7. long vs trimelm, local", "higher", change(("long", "local"), ("trimelm", "local")), lambda v: v > 0)
    in_store = Compared(stored)
    check("8. kNN-LM vs plain", "about -12 %", change(("plain", "knn"), ("plain", "none"), in_store), lambda v: v <= -0.05)
    joint = change(("plain", "external, untuned"), ("plain", "none"), in_store)
    check("8. plain with the store in one softmax, temperature 1", "does not help", joint, lambda v: v > 0)
    check("9. stopped keys vs full gradient, +1024", "-1 % or higher", change(("long-stopped", "+1024"), ("long", "+1024")), lambda v: v >= -0.01)
    for name, least in (("trimelm", 0.95), ("long", 0.8), ("ext", 0.8)):
        check(f"10. training speed of {name}", f"{least} or more of plain", speed.get(name), lambda v, least=least: v >= least, ".2f")
    table(["check", "mark", "found", "holds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-trime"))
    parser.add_argument("--tokens", type=int, default=1_048_576, help="of training, about")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16, help="segments a step")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--test-tokens", type=int, default=61_000, help="held-out tokens, a third of them for tuning")
    parser.add_argument("--keys", type=int, default=400_000, help="of the datastore")
    parser.add_argument("--store-tokens", type=int, default=18_000, help="held-out tokens scored with a datastore")
    parser.add_argument("--no-external", action="store_true", help="without the datastore")
    parser.add_argument("--deepspeed", default="zero0")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each")
    options = parser.parse_args()
    options.work = options.work.absolute()
    path = prepare(options)
    arms = arms_of(options, path)
    train(arms, options.jobs)
    print(f"{device_name(torch.device('cuda' if torch.cuda.is_available() else 'cpu'))}, torch {torch.__version__}")
    tokens = arms[0].artifact("tokenize").metrics["train_tokens"]
    print(
        f"{tokens:,} training tokens, {arms[0].recipe.pretrain.steps} steps of {options.batch} x {LENGTH}, groups of {options.group_size},"  # type: ignore[union-attr]
        f" seeds {options.seeds}; {options.layers} layers, width {options.width}, vocabulary {options.vocabulary}"
    )
    speed = training_speed(arms)
    table(
        ["arm", "parameters", "last loss", "memory share", "speed of plain"],
        [
            [arm.name, f"{metrics['parameters']:,}", f"{metrics.get('loss_trime', metrics.get('loss_causal')):.3f}",
             f"{metrics.get('memory_share', 0):.1%}", f"{speed[arm.name]:.2f}"]
            for arm in arms if arm.seed == options.seeds[0] for metrics in [arm.artifact("pretrain").metrics]
        ],
    )  # fmt: skip
    found = {arm: measure(arm, options.test_tokens) for arm in arms}
    columns = [
        "none",
        "local",
        *(f"+{size}" for size in SIZES),
        *(f"+{size} bias" for size in SIZES[1:]),
        "cache",
        *(f"cache+{size}" for size in SIZES),
    ]
    table(["test perplexity", *columns], [[name, *(average(found, name, column) for column in columns)] for name in options.arms])
    pairs(Compared(found), PAIRS)
    stored: dict[Arm, Row] = {}
    if not options.no_external:
        store_arms = [arm for arm in arms if arm.name in STORED and arm.seed == options.seeds[0]]
        names: list[str] = []
        for domain, of in (("wikipedia", "wikipedia"), ("books", "wikipedia"), ("books", "books")):
            results = {arm: with_store(arm, options, domain, of) for arm in store_arms}
            names = names or [name for name in next(iter(results.values())) if "untuned" not in name]
            print(f"\nTested on {domain}, with a datastore of {options.keys:,} keys of {of}; long memory {LONG}:")
            table(["test perplexity", *names], [[arm.name, *(ppl(row[name]) for name in names)] for arm, row in results.items()])
            if domain == "wikipedia":
                pairs(Compared(results), STORE_PAIRS)
                stored = results
    checks(found, stored, speed, options.test_tokens)


if __name__ == "__main__":
    main()
