"""A recipe -> a chain of Slurm jobs, one a stage, each waiting for the one before; and what has become of it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import artifacts, workflow
from pipeline.errors import UserError
from pipeline.launch.settings import JobSettings
from pipeline.recipe import STAGES, Recipe
from pipeline.shipped import shipped
from pipeline.terminal import headline
from pipeline.workflow import Step

JOBS = "jobs.json"
"""Below `runs/<name>/slurm/`: what was submitted for each stage and fingerprint."""

_ON_CPU = ("tokenize", "pack")
_ONE_PROCESS = ("evaluate",)


@dataclass(frozen=True)
class Job:
    """A job in the queue. `text`: the script as it was submitted."""

    stage: str
    number: str
    text: Path


# -- the script of a stage -------------------------------------------------------------------------------------------


def render(recipe: Recipe, recipe_file: Path, stage: str, dependency: str | None = None) -> str:
    """The script in `slurm/` with the recipe's options, environment and setup lines after its own header.

    recipe_file: what the job reads; shared.sh is expected beside it. dependency: number of the job that must succeed first.
    """
    job = job_settings(recipe, stage)
    script = shipped("slurm", f"{stage}.sbatch").read_text()
    lines = script.splitlines()
    header = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    log = str(recipe.directory.absolute() / "logs" / "slurm" / stage).replace("%", "%%")
    options = {
        "job-name": f"{recipe.name}.{stage}",
        "chdir": os.getcwd(),
        "output": f"{log}-%j.out",
        "dependency": dependency and f"afterok:{dependency}",
        "kill-on-invalid-dep": dependency and "yes",
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "time": job.time,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task,
        "mem": job.memory,
        "signal": f"USR2@{recipe.slurm.signal_seconds}" if "--signal=" in script else None,
    }
    environment = {
        "TRIMLINE_RECIPE": recipe_file.absolute(),
        "TRIMLINE_SHARED": recipe_file.absolute().with_name("shared.sh"),
        "TRIMLINE_PYTHON": sys.executable,
        "TRIMLINE_MPI": recipe.slurm.mpi,
    }
    return "\n".join(
        [
            *lines[:header],
            *(f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None),
            *(f"#SBATCH {option}" for option in job.extra),
            "",
            "set -e",
            *(f"export {name}={shlex.quote(str(value))}" for name, value in environment.items()),
            *job.setup,
            *lines[header:],
            "",
        ]
    )


def job_settings(recipe: Recipe, stage: str) -> JobSettings:
    """What one stage asks of the cluster: the common settings, overridden by `slurm.stages`.

    Nodes and tasks are always said. GPUs are asked for tokenize and pack only where `slurm.stages` does; a single process takes one.
    """
    own = _said(recipe.slurm.stages[stage]) if stage in recipe.slurm.stages else {}
    common = {key: value for key, value in _said(recipe.slurm).items() if key in JobSettings.model_fields}
    merged = {"nodes": 1, **common, **own}
    merged.setdefault("tasks_per_node", merged.get("gpus_per_node") or 1)
    if stage in _ON_CPU and "gpus_per_node" not in own:
        merged.pop("gpus_per_node", None)
    if stage in _ONE_PROCESS:
        merged |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": min(1, merged.get("gpus_per_node", 0))}
    return JobSettings(**merged)


def _said(settings: JobSettings) -> dict[str, Any]:
    return {name: value for name, value in settings if value not in (None, ())}


# -- submitting ------------------------------------------------------------------------------------------------------


def submit(recipe: Recipe, *, dry_run: bool = False) -> list[Job]:
    """Submit the stages that are not up to date, each after the one before; those in the queue already are left there.

    The recipe as it is now, and every script, are kept in `runs/<name>/slurm/<time>/`. A dry run prints the scripts and writes nothing.
    Raises UserError when there is no sbatch, or it refuses a job; what was submitted before that job is cancelled.
    """
    unknown = [stage for stage in recipe.slurm.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"slurm.stages: unknown stage {', '.join(unknown)}; known: {', '.join(STAGES)}")
    if not dry_run and shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: submit from a login node of a Slurm cluster, look with --dry-run, or run here with trimline run")
    steps = workflow.resolve(recipe)
    todo = [step for step in steps if step.artifact is None]
    queue = {} if dry_run else _queue()
    known = _jobs(recipe)
    place = recipe.directory / "slurm" / time.strftime("%Y%m%d-%H%M%S")
    if not dry_run and any(_queued(step, known, queue) is None for step in todo):
        _snapshot(recipe, place)
    submitted: list[Job] = []
    before: str | None = None
    for step in steps:
        if step.artifact is not None:
            print(f"{step.stage:<9} is up to date")
            continue
        already = _queued(step, known, queue)
        if already is not None:
            print(f"{step.stage:<9} is in the queue already: job {already} ({' '.join(queue[already]).lower()})")
            before = already
            continue
        text = render(recipe, place / "recipe.yaml", step.stage, before)
        if dry_run:
            print(f"\n# {step.stage}: {step.why}\n{text}", end="")
            before = f"<{step.stage}>"
            continue
        job = _sbatch(step.stage, text, place / f"{step.stage}.sbatch", submitted)
        submitted.append(job)
        known[step.name] = {"job": job.number, "text": str(job.text)}
        artifacts.write_json(recipe.directory / "slurm" / JOBS, known)
        asked = job_settings(recipe, step.stage)
        after = f", after {before}" if before else ""
        print(f"{step.stage:<9} job {job.number}: {asked.nodes} x {asked.tasks_per_node} tasks{after}; {job.text}")
        before = job.number
    return submitted


def _snapshot(recipe: Recipe, place: Path) -> None:
    """What the jobs will read: a later change of the recipe, or of Trimline's scripts, does not reach them."""
    artifacts.make_directory(place)
    artifacts.make_directory(recipe.directory / "logs" / "slurm")
    content = recipe.model_dump(mode="json", by_alias=True)
    (place / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    shutil.copyfile(shipped("slurm", "shared.sh"), place / "shared.sh")


def _sbatch(stage: str, text: str, path: Path, before: list[Job]) -> Job:
    path.write_text(text)
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if done.returncode:
        if before:
            subprocess.run(["scancel", *(job.number for job in before)], capture_output=True)
        cancelled = f"; cancelled {', '.join(job.stage for job in before)}, submitted just before" if before else ""
        reason = done.stderr.strip().removeprefix("sbatch: ") or f"exit code {done.returncode}"
        raise UserError(f"sbatch refused {stage}: {reason}\nthe script is {path}; change the slurm section of the recipe{cancelled}")
    return Job(stage, done.stdout.strip().partition(";")[0], path)


def _jobs(recipe: Recipe) -> dict[str, dict[str, str]]:
    path = recipe.directory / "slurm" / JOBS
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, if none of the run's jobs is in the queue") from None


def _queue() -> dict[str, tuple[str, str]]:
    """State and reason of every job of this user that has not ended, by number. Empty where there is no Slurm."""
    if shutil.which("squeue") is None:
        return {}
    done = subprocess.run(["squeue", "--me", "--noheader", "--format=%i|%T|%r"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"squeue does not answer ({(done.stderr.strip().splitlines() or ['no message'])[-1]})")
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {number: (state, reason) for number, state, reason in rows if state != "COMPLETING"}


def _queued(step: Step, known: dict[str, dict[str, str]], queue: dict[str, tuple[str, str]]) -> str | None:
    number = known.get(step.name, {}).get("job")
    return number if number in queue else None


# -- status ----------------------------------------------------------------------------------------------------------


def status(recipe: Recipe) -> list[tuple[str, str, str, str]]:
    """A row a stage: its name, state, when, and figures: of a finished stage its headline, of a running one the last line it logged."""
    try:
        queue = _queue()
    except UserError as error:
        print(f"trimline: {error}; jobs are not shown", file=sys.stderr)
        queue = {}
    known = _jobs(recipe)
    return [_status_of(recipe, step, known.get(step.name, {}).get("job"), queue) for step in workflow.resolve(recipe)]


def _status_of(recipe: Recipe, step: Step, number: str | None, queue: dict[str, tuple[str, str]]) -> tuple[str, str, str, str]:
    if step.artifact is not None:
        return step.stage, "done", _clock(step.artifact.manifest["finished"]), headline(step.artifact.metrics)
    when, figures = _progress(recipe, step)
    if number in queue:
        state, reason = queue[number]
        return step.stage, f"running: job {number}" if state == "RUNNING" else f"queued: job {number} ({reason})", when, figures
    if artifacts.in_work(recipe.directory, step.stage, step.fingerprint):
        return step.stage, "running", when, figures
    ended = f"; job {number} ended, see {recipe.directory}/logs/slurm/{step.stage}-{number}.out" if number else ""
    return step.stage, f"{step.why}{ended}", when, figures


def _progress(recipe: Recipe, step: Step) -> tuple[str, str]:
    """When a stage last logged, and what: `step 120 of 400, loss 6.21, 3 min left`. Empty where it has not."""
    logs = (recipe.directory / "logs" / step.name).rglob("metrics.jsonl")
    changed, log = max(((log.stat().st_mtime, log) for log in logs), default=(0.0, None))
    if log is None:
        return "", ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (64 << 10)))
        lines = [line for line in file.read().splitlines() if line.startswith(b"{") and line.endswith(b"}")]
    last = json.loads(lines[-1]) if lines else {}
    figures = [f"loss {last['loss']:.4g}"] if "loss" in last else []
    if step.stage != "pretrain" or recipe.pretrain is None:  # only there the recipe counts in steps
        return _clock(changed), ", ".join([f"step {last.get('step', 0)}", *figures])
    rates = next((record for line in reversed(lines) if (record := json.loads(line)).get("rows_per_second")), None)
    if rates:
        left = (recipe.pretrain.steps - last["step"]) * recipe.pretrain.batch_size / rates["rows_per_second"]
        if recipe.pretrain.time_budget is not None:
            left = min(left, max(0.0, 60 * recipe.pretrain.time_budget - rates["seconds"]))
        figures.append(f"{left / 60:.0f} min left")
    return _clock(changed), ", ".join([f"step {last.get('step', 0)} of {recipe.pretrain.steps}", *figures])


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
