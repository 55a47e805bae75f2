"""What each acceleration of masked-language-model pretraining buys: TUPE, notes (TNF), the meta-controller (MC-BERT), ELECTRA, alone and together.

    python benchmarks/acceleration.py --data DIR [--work DIR] [--setting small] [--seeds 1 2] [--arms plain tupe-relative ...] [--tasks SST-2 ...]

DIR holds wikipedia/train.jsonl.gz and books/train.jsonl.gz, a {"text": ...} a line, and glue/SST-2, CoLA, STS-B, RTE. Every arm is a recipe,
trained by the pretrain stage on the same rows in the same order with the same masks; the models along the way are kept and measured afterwards,
so that measuring takes no training time. What an earlier call has made in the work directory is used again.

Settings: small is for one CPU thread an arm (2 layers, width 64, vocabulary 2,048, 3.3 M tokens; token vectors begin as those of the text's
co-occurrences, in all arms), large for a GPU (6 layers, width 384, vocabulary 8,192, 330 M tokens; cut it by --steps). Names of arms:
`2lr` has twice the learning rate, `sin` a position table that begins as sinusoids; `warm` arms go on from the half-trained plain-sin or
tupe-relative model, since from new weights generator and choice learn nothing yet at the small size. What a step costs at BERT-base's shape is
in objectives.py.

Measures: value, held-out loss of the masked-language-model head with every target masked; probe [MASK] and probe words, held-out losses of a new
head on the frozen encoder, targets masked or replaced by random words (each objective is at its best where the input looks like its own training);
tasks, fine-tuned. A point along the way is a model whose learning rate has not fallen yet, held against a baseline's end, so the fractions
are on the high side. Times are CPU time of one thread, arms in turn; on a shared machine ratios differ by a tenth from call to call.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from acceleration_arms import KINDS, SIZES, Arm, Size, train
from acceleration_curves import at, draw, reached, scalars
from acceleration_data import make_start, prepare
from acceleration_measures import PROBES, TASKS, device, finetuned, probe, step_times, value

from pipeline.errors import UserError
from pipeline.models.stopwatch import device_name
from pipeline.objectives.base import Objective
from pipeline.objectives.electra import Electra
from pipeline.objectives.meta_controller import MetaController
from pipeline.tasks.settings import GlueName
from pipeline.training.telemetry import quotients

MEASURES = ("value", *(f"probe {shown}" for shown in PROBES))
CLAIMS = {
    frozenset({"TUPE"}): "30% (Ke et al. 2021)",
    frozenset({"notes"}): "40% (Wu et al. 2021)",
    frozenset({"meta_controller"}): "20% (Xu et al. 2020)",
    frozenset({"TUPE", "notes", "meta_controller"}): "10% (nowhere published)",
}
"""Share of a plain BERT's time in which these are said to be as good."""
FACTORIAL = {
    "absolute": ("plain", "notes", "mc", "notes-mc"),
    "tupe-relative": ("tupe-relative", "tupe-notes", "tupe-mc", "tupe-notes-mc"),
    "absolute, warm": ("warm", "warm-notes", "warm-mc", "warm-notes-mc"),
    "tupe-relative, warm": ("warm-tupe", "warm-tupe-notes", "warm-tupe-mc", "warm-tupe-notes-mc"),
}
"""Positions -> the arms without more, with notes, with the meta-controller, with both."""
OBJECTIVES: dict[str, type[Objective]] = {"meta_controller": MetaController, "electra": Electra}
Curve = dict[int, float]
Curves = dict[str, Curve]
"""Measure -> step -> loss."""

# -- making and measuring ----------------------------------------------------------------------------------------------


def make(arm: Arm, tasks: Sequence[GlueName], task_seeds: Sequence[int], logs: Path) -> None:
    """Trains an arm and measures it, in a process of a pool; everything is kept where `Found` looks for it."""
    torch.set_num_threads(1)
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"{arm.name}-{arm.seed}.txt"
    with open(path, "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        train(arm)
        measured(arm)
        with_notes(arm)
        tasks_of(arm, tasks, task_seeds)
    except Exception:
        traceback.print_exc()
        raise UserError(f"{arm.name}, seed {arm.seed}: failed, see {path}") from None


def measured(arm: Arm) -> Curves:
    found: Curves = {}
    if arm.kind.objective["name"] == "mlm":
        found["value"] = {step: value(arm, step) for step in (0, *arm.points(arm.size.values))}
    return found | {f"probe {shown}": {step: probe(arm, step, shown) for step in (0, *arm.points(arm.size.probes))} for shown in PROBES}


def with_notes(arm: Arm) -> float | None:
    """The value at the end with the notes taken on the way, which are thrown away else."""
    notes = arm.kind.notes
    if notes is None or notes.get("weight") == 0 or arm.kind.objective["name"] != "mlm":
        return None
    return value(arm, arm.steps, notes=True)


def tasks_of(arm: Arm, tasks: Sequence[GlueName], task_seeds: Sequence[int]) -> dict[str, dict[int, list[float]]]:
    """Task -> step -> scores by seed, in percent; of the first baseline, those before any training too."""
    points = [0] * (arm.name == arm.size.baselines[0]) + arm.points(arm.size.finetuned)
    return {task: {step: [finetuned(arm, step, task, seed) for seed in task_seeds] for step in points} for task in tasks}


def made(arms: list[Arm], options: argparse.Namespace) -> None:
    """Makes all arms: those that others go on from first."""
    for arm in {arm.seed: arm for arm in arms}.values():
        prepare(arm)
        arm.unigram  # noqa: B018 kept in a file before the pool needs it
    for arm in arms:
        make_start(arm)
    first = [arm for arm in arms if arm.warm_from is None]
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for wave in (first, [arm for arm in arms if arm.warm_from is not None]):
            running = {pool.submit(make, arm, options.tasks, options.task_seeds, options.work / "logs"): arm for arm in wave}
            for job in concurrent.futures.as_completed(running):
                arm = running[job]
                print(job.exception() or f"made {arm.name}, seed {arm.seed}", file=sys.stderr, flush=True)
            if failed := [job for job in running if job.exception()]:
                failed[0].result()


# -- tables ------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the standard deviation where there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}" if values else ""


def switches(name: str) -> frozenset[str]:
    kind = KINDS[name]
    objective = kind.objective["name"]
    return frozenset([*["TUPE"] * kind.positions.startswith("tupe"), *["notes"] * (kind.notes is not None), *[objective] * (objective != "mlm")])


class Found:
    """Everything measured, by arm's name and seed."""

    def __init__(self, arms: list[Arm], options: argparse.Namespace):
        self.arms, self.size = arms, options.size
        self.names = list(dict.fromkeys(arm.name for arm in arms))
        self.curves = {(arm.name, arm.seed): measured(arm) for arm in arms}
        self.tasks = {(arm.name, arm.seed): tasks_of(arm, options.tasks, options.task_seeds) for arm in arms}
        self.with_notes = {(arm.name, arm.seed): loss for arm in arms if (loss := with_notes(arm)) is not None}
        self.seeds = options.seeds
        self.times: dict[str, float] = {}

    def ends(self, name: str, measure: str) -> list[float]:
        """At the end of training, by seed."""
        curves = [self.curves[name, seed].get(measure) for seed in self.seeds if (name, seed) in self.curves]
        return [curve[max(curve)] for curve in curves if curve]

    def control(self, name: str, measure: str) -> str | None:
        """What an arm is held against: the best baseline, or for a warm arm the one that goes on as it began."""
        if KINDS[name].warm:
            control = "warm-tupe" if KINDS[name].positions.startswith("tupe") else "warm"
            return control if control in self.names else None
        found = [baseline for baseline in self.size.baselines if baseline in self.names]
        return min(found, key=lambda baseline: statistics.mean(self.ends(baseline, measure))) if found else None

    def claim(self, name: str, control: str) -> str:
        """What is said of the switches that the arm has and its control has not."""
        return CLAIMS.get(switches(name) - switches(control), "")

    def ratio(self, name: str) -> float:
        """Time of a step over that of the first baseline there is."""
        first = next((baseline for baseline in self.size.baselines if baseline in self.times), None)
        return math.nan if first is None else self.times[name] / self.times[first]


def quality(found: Found, tasks: Sequence[GlueName]) -> None:
    rows = []
    points = [("untrained", found.size.baselines[0], 0)] * (found.size.baselines[0] in found.names)
    for label, name, step in (*points, *((name, name, -1) for name in found.names)):
        cells = []
        for measure in MEASURES:
            curves = [curve for seed in found.seeds if (curve := found.curves[name, seed].get(measure))]
            cells.append(mean([curve[step if step == 0 else max(curve)] for curve in curves]))
        for task in tasks:
            by_step = [found.tasks[name, seed][task] for seed in found.seeds]
            cells.append(mean([score for scores in by_step for score in scores[step if step == 0 else max(scores)]], 1))
        time = [f"{found.times[name]:.0f}", f"{found.ratio(name):.2f}"] if step and name in found.times else ["", ""]
        rows.append([label, *cells, *time])
    print("\nAt the end of training, mean ± standard deviation over seeds (of tasks: over those of training and fine-tuning)")
    table(["arm", *MEASURES, *tasks, "ms a step", "of the first"], rows)


def factorial(found: Found) -> None:
    rows = []
    for positions, names in FACTORIAL.items():
        if any(name not in found.names for name in names):
            continue
        for measure in MEASURES[1:]:
            rows.append([positions, measure, *(mean(found.ends(name, measure)) for name in names)])
    if rows:
        print("\nPositions x notes x meta-controller, at the end of training")
        table(["positions", "measure", "alone", "notes", "meta-controller", "both"], rows)


def equal_time(found: Found) -> None:
    """Each arm at the step where it has taken as long as its control in all."""
    rows = []
    for name in found.names:
        cells = []
        for measure in MEASURES:
            control = found.control(name, measure)
            if control is None or name not in found.times or not found.ends(name, measure):
                cells.append("")
                continue
            cells.append(
                mean([difference for seed in found.seeds if (difference := _at_equal_time(found, name, control, measure, seed)) is not None])
            )
        rows.append([name, *cells])
    print("\nAgainst the best baseline (a warm arm: against warm, or warm-tupe) when it has taken the same time; negative: better")
    table(["arm", *MEASURES], rows)


def _at_equal_time(found: Found, name: str, control: str, measure: str, seed: int) -> float | None:
    one, other = found.curves[name, seed].get(measure), found.curves[control, seed].get(measure)
    if not one or not other:
        return None
    until = max(other) * found.times[control] / found.times[name]
    return at(one, min(until, max(one))) - other[max(other)]


def fractions(found: Found) -> None:
    rows = []
    for name in found.names:
        control = found.control(name, "value")
        if control is not None and control != name:
            rows.append([name, control, *(_fraction(found, name, control, measure) for measure in MEASURES), found.claim(name, control)])
    print("\nShare of the control's steps, and of its time, until its final quality is reached; points along the way joined by lines")
    table(["arm", "control", *MEASURES, "of time, as claimed"], rows)


def _fraction(found: Found, name: str, control: str, measure: str) -> str:
    if not found.ends(name, measure) or not found.ends(control, measure):
        return ""
    shares = []
    for seed in found.seeds:
        other = found.curves[control, seed][measure]
        step = reached(found.curves[name, seed][measure], other[max(other)])
        shares.append(math.inf if step is None else step / max(other))
    if not all(map(math.isfinite, shares)):
        return "not reached" if len(shares) == 1 else f"not reached by {sum(map(math.isinf, shares))} of {len(shares)}"
    time = f", {statistics.mean(shares) * found.times[name] / found.times[control]:.2f}" if {name, control} <= set(found.times) else ""
    return f"{mean(shares, 2)}{time}"


# -- marks -------------------------------------------------------------------------------------------------------------


def along(arm: Arm, share: float) -> dict[str, float]:
    """Means of the log of training over the twentieth of its steps before that share of them: losses, figures, quotients."""
    lines = [json.loads(line) for line in (arm.logs / "metrics.jsonl").read_text().splitlines()]
    count = max(len(lines) // 20, 1)
    end = max(round(share * len(lines)), count)
    means = {name: statistics.mean(line["losses"][name] for line in lines[end - count : end]) for name in lines[0]["losses"]}
    return means | quotients(OBJECTIVES[arm.kind.objective["name"]].ratios, means)


def rate_floor(wrong: float, options: int) -> float:
    """Cross-entropy of a choice that knows how often the token shown is wrong, and nothing else; options: 2 is ELECTRA's question."""
    return -(1 - wrong) * math.log(1 - wrong) - wrong * math.log(wrong / (options - 1))


def marks(found: Found) -> None:
    rows: list[list[str]] = []
    by_name = {(arm.name, arm.seed): arm for arm in found.arms}

    def mark(what: str, wanted: str, values: Sequence[float], holds: Callable[[float], bool], style: str = "+.3f") -> None:
        if values:
            verdict = "yes" if all(map(holds, values)) else "NO"
            rows.append([what, wanted, ", ".join(format(each, style) for each in values), verdict])

    def differences(one: str, other: str | None, measure: str = "value") -> list[float]:
        if other is None or one not in found.names or other not in found.names:
            return []
        return [a - b for a, b in zip(found.ends(one, measure), found.ends(other, measure), strict=True)]

    if found.size.ppmi:  # what the small size shows
        best = found.control("tupe-relative", "value")
        mark(f"TUPE-R against the best baseline ({best})", "below -0.3", differences("tupe-relative", best), lambda v: v < -0.3)
        mark(f"TUPE-A against the best baseline ({best})", "below -0.3", differences("tupe-absolute", best), lambda v: v < -0.3)
        mark("TUPE-R against TUPE-A", "within 0.05", differences("tupe-relative", "tupe-absolute"), lambda v: abs(v) < 0.05)
        mark("TUPE-R against BERT-R", "far below", differences("tupe-relative", "absolute-relative"), lambda v: v < -0.1)
        mark("BERT-R against plain", "far below", differences("absolute-relative", "plain"), lambda v: v < -0.1)
        for name in ("tupe-absolute", "tupe-relative"):
            escapes = []
            for seed in found.seeds:
                if (name, seed) in by_name:
                    unigram = by_name[name, seed].unigram
                    escape = reached(found.curves[name, seed]["value"], float(-(unigram * np.log(unigram)).sum()) - 0.2)
                    escapes.append(math.inf if escape is None else escape)
            mark(f"step at which {name} leaves the unigrams' plateau by 0.2", "before 200", escapes, lambda v: v < 200, ".0f")
        if {"tupe-notes-off", "tupe-relative"} <= set(found.names):
            same = [by_name["tupe-notes-off", seed].bits == by_name["tupe-relative", seed].bits for seed in found.seeds]
            mark("weights with notes of weight 0, and without notes", "the same bits", same, bool, "")
    for name in found.names:
        kind, arms = KINDS[name], [by_name[name, seed] for seed in found.seeds]
        if (name, found.seeds[0]) in found.with_notes:
            gains = [found.with_notes[name, seed] - end for seed, end in zip(found.seeds, found.ends(name, "value"), strict=True)]
            mark(f"value of {name} with its notes less without", "below 0", gains, lambda v: v < 0, "+.4f")
        if kind.objective["name"] == "mlm":
            continue
        early, late = ([along(arm, share) for arm in arms] for share in (0.1, 1.0))
        under = [floor_of(arm, end) for arm, end in zip(arms, late, strict=True)]
        mark(f"the model's loss in {name} less that of knowing the kinds' rates", "below 0", under, lambda v: v < 0)
        moved = [end["accuracy_replaced"] - start["accuracy_replaced"] for start, end in zip(early, late, strict=True)]
        mark(f"{name}: right on replaced, at the end less at a tenth", "moves", moved, lambda v: abs(v) > 0.01, "+.1%")
    table(["check", "mark", "found, by seed", "holds"], rows)


def floor_of(arm: Arm, means: dict[str, float]) -> float:
    """The model's loss less that of a guess by the kinds' rates."""
    if arm.kind.objective["name"] == "electra":
        return means["discriminate"] - rate_floor(1 - means["original"], 2)
    settings = arm.recipe.pretrain.objective  # type: ignore[union-attr]
    hidden = settings.mask_rate * (arm.size.length - 2) / arm.size.length  # type: ignore[union-attr]
    return means["choice"] - rate_floor(means["replaced"] * hidden, settings.options)  # type: ignore[union-attr]


def kinds(found: Found) -> None:
    """Accuracy by kind along the way: the task gets harder as the generator learns."""
    rows = []
    for arm in found.arms:
        if arm.kind.objective["name"] == "mlm" or arm.seed != found.seeds[0]:
            continue
        for share in (0.1, 0.25, 0.5, 0.75, 1.0):
            part = along(arm, share)
            loss = part.get("choice", part.get("discriminate", math.nan))
            others = part.get("accuracy_kept", part.get("accuracy_original", math.nan))
            numbers = (part["mlm"], loss, part["replaced"], part["accuracy_replaced"], others, part.get("accuracy_shown", math.nan))
            rows.append([arm.name, f"{share:.0%}", *(f"{number:.3f}" for number in numbers)])
    if rows:
        print("\nAlong the way, first seed: losses of generator and model, share of the hidden that is replaced, and how often the model is right")
        table(["arm", "of the steps", "generator", "model", "replaced", "right on replaced", "on kept or original", "on never hidden"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-acceleration"))
    parser.add_argument("--setting", choices=list(SIZES), default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", choices=list(KINDS), metavar="ARM", help="default: the setting's own")
    parser.add_argument("--steps", type=int, help="of training; default: the setting's own")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--task-seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--repeats", type=int, default=15, help="of timing a step; 0: no times")
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else 2, help="arms at a time, a thread each")
    options = parser.parse_args()
    options.work, options.data = options.work.absolute(), options.data.absolute()
    os.environ["OMP_NUM_THREADS"] = "1"
    size: Size = SIZES[options.setting]
    options.size = size if options.steps is None else dataclasses.replace(size, steps=options.steps)
    names = list(dict.fromkeys(options.arms or options.size.arms))
    needed = [warm for name in names if (warm := KINDS[name].warm) and warm not in names]
    arms = [Arm(name, seed, options.size, options.data, options.work) for seed in options.seeds for name in dict.fromkeys([*needed, *names])]
    made(arms, options)
    print(f"{device_name(device())}, torch {torch.__version__}")
    rows = f"{options.size.steps} steps of {options.size.batch} x {options.size.length} tokens"
    print(f"{options.setting}: {rows} (warm: half of them), seeds {options.seeds}; {options.size.model}, vocabulary {options.size.vocabulary}")
    found = Found(arms, options)
    if options.repeats:
        found.times = step_times([arm for arm in arms if arm.seed == options.seeds[0]], options.repeats)
    quality(found, options.tasks)
    factorial(found)
    equal_time(found)
    fractions(found)
    marks(found)
    kinds(found)
    draw(found.curves, found.times, options.work / f"curves-{options.setting}.png")
    scalars(found.curves, options.work / "tensorboard" / options.setting)


if __name__ == "__main__":
    main()
