"""The stage graph: what is done, what is stale and why, what runs next."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.artifacts import Artifact
from pipeline.corpus import sources
from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.memory import description as datastores
from pipeline.memory.settings import IndexSettings
from pipeline.recipe import PruneSettings, Recipe
from pipeline.tasks import sources as task_sources
from pipeline.training import deepspeed_config
from pipeline.training.settings import TrainSettings

INPUTS = {
    "tokenize": (),
    "pack": ("tokenize",),
    "pretrain": ("tokenize", "pack"),
    "index": ("tokenize", "pretrain"),
    "finetune": ("tokenize", "pretrain"),
    "prune": ("finetune",),
    "evaluate": ("tokenize", "pack", "pretrain", "index", "finetune", "prune"),
}
"""Which stages a stage reads, of those that the recipe has."""


@dataclass(frozen=True)
class Step:
    """One stage of a recipe: what it is made of, and whether that is there already."""

    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    fingerprint: str
    artifact: Artifact | None
    unfinished: bool
    why: str

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.fingerprint[:8]}"


@dataclass(frozen=True)
class Work:
    """What a stage is given: its recipe, its inputs, where to write, and which rank it is.

    directory: the `.partial` directory that becomes the artifact. Files in it survive a kill.
    scratch: below it, for what only unfinished work needs (checkpoints, spools); removed before publishing.
    logs: what a person watches while it runs (TensorBoard events, metrics.jsonl); not part of the artifact.
    """

    stage: str
    recipe: Recipe
    inputs: dict[str, Artifact]
    directory: Path
    logs: Path
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def scratch(self) -> Path:
        return self.directory / "scratch"

    def input(self, stage: str) -> Path:
        """The directory that a stage before this one published."""
        return self.inputs[stage].path


def resolve(recipe: Recipe) -> list[Step]:
    """Every stage of the recipe in order, each found or not. Reads manifests only."""
    steps: list[Step] = []
    fingerprints: dict[str, str] = {}
    for stage in recipe.stages:
        settings = _settings(recipe, stage, steps)
        inputs = {name: fingerprints[name] for name in INPUTS[stage] if name in fingerprints}
        digest = fingerprints[stage] = artifacts.fingerprint(settings, inputs)
        if stage == "index":  # a change of the datastore that was cut off would look like damage
            datastores.complete(recipe.directory / f"{stage}-{digest[:8]}" / "datastore")
        artifact = artifacts.find(recipe.directory, stage, digest)
        partial = recipe.directory / f"{stage}-{digest[:8]}.partial"
        why = "up to date" if artifact else _why(recipe.directory, stage, settings, inputs, steps, partial.is_dir())
        steps.append(Step(stage, settings, inputs, digest, artifact, partial.is_dir() and artifact is None, why))
    return steps


def _settings(recipe: Recipe, stage: str, before: list[Step]) -> dict[str, Any]:
    """The resolved settings a stage depends on, by section; sources enter by what they contain."""
    found: dict[str, Any] = {"seed": recipe.seed, stage: artifacts.results_only(getattr(recipe, stage))}
    if stage in ("pretrain", "finetune"):
        found["model"] = artifacts.results_only(recipe.model)
    if recipe.model.from_ is not None and stage in ("pretrain", "finetune"):
        found["model_files"] = sources.directory_identity(recipe.model.from_)
    if stage == "index":
        assert recipe.index is not None
        found |= _index_settings(recipe, recipe.index)
    if stage == "evaluate":
        found |= _datastore_revision(recipe, before)
    if stage == "evaluate" and recipe.evaluate and recipe.evaluate.memory and recipe.pretrain is None and recipe.model.from_ is not None:
        found |= {"model": artifacts.results_only(recipe.model), "model_files": sources.directory_identity(recipe.model.from_)}
    if stage == "pack":
        found["kind"] = recipe.model.kind
    if stage == "tokenize":
        assert recipe.tokenize is not None
        found["sources"] = sources.identity(recipe.tokenize)
    if stage == "prune" and recipe.prune and recipe.prune.distillation.teacher:
        found["teacher_files"] = sources.directory_identity(recipe.prune.distillation.teacher)
    if stage == "prune" and recipe.prune and recipe.prune.distillation.teacher_outputs:
        found["teacher_outputs"] = artifacts.file_identity(sources.checked(Path(recipe.prune.distillation.teacher_outputs)))
    if stage == "finetune":
        assert recipe.finetune is not None
        found["task"] = task_sources.identity(recipe.finetune.task)
    return found


def _index_settings(recipe: Recipe, index: IndexSettings) -> dict[str, Any]:
    found: dict[str, Any] = {"window": index.window.resolved(recipe.pack.length if recipe.pack else None)}
    if index.sources:
        found["sources"] = [sources.source_identity(source) for source in index.sources]
    if index.encoder is not None:
        found["encoder_files"] = sources.directory_identity(index.encoder)
    elif recipe.pretrain is None and recipe.model.from_ is not None:
        found |= {"model": artifacts.results_only(recipe.model), "model_files": sources.directory_identity(recipe.model.from_)}
    return found


def _datastore_revision(recipe: Recipe, before: list[Step]) -> dict[str, str]:
    """Which documents the datastore has that evaluate reads: another run's by name, or the run's own, once it is not as the index stage made it."""
    assert recipe.evaluate is not None
    if recipe.evaluate.datastore is not None:
        return {"datastore_revision": datastores.revision(recipe.evaluate.datastore)}
    own = next((step.artifact for step in before if step.stage == "index"), None)
    changed = None if own is None else datastores.changed(own.path)
    return {} if changed is None else {"datastore_revision": changed}


def _why(directory: Path, stage: str, settings: dict[str, Any], inputs: dict[str, str], before: list[Step], unfinished: bool) -> str:
    """Why a stage must run, in a line: what changed since it was last made."""
    if unfinished:
        return "unfinished: resumes"
    stale_inputs = [step.stage for step in before if step.stage in inputs and step.artifact is None]
    last = artifacts.latest(directory, stage)
    if last is None:
        return "not made yet"
    changes = _differences(last.manifest["settings"], settings)
    if changes:
        return f"stale: {', '.join(changes[:3])}{f' and {len(changes) - 3} more' if len(changes) > 3 else ''}"
    changed_inputs = [name for name in inputs if last.manifest["inputs"].get(name) != inputs[name]] or stale_inputs
    return f"stale: made from another {', '.join(changed_inputs)}"


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        return [change for key in keys for change in _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)]
    if json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True):
        return []
    return [f"{at} {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check(recipe: Recipe, stage: str, size: int) -> Step:
    """What can be known before `size` ranks start a stage: that its inputs are made, and that there is work for each rank.

    Raises UserError when not.
    """
    steps = {step.stage: step for step in resolve(recipe)}
    step = steps[stage]
    missing = [name for name in step.inputs if steps[name].artifact is None]
    if missing:
        raise UserError(f"{stage} reads {', '.join(missing)}, not made yet ({steps[missing[0]].why}); run trimline {missing[0]} first")
    packed = steps["pack"].artifact if stage == "pretrain" else None
    if packed is not None and packed.metrics["segments"] < size:
        raise UserError(f"pretrain: {size} ranks share {packed.metrics['segments']} segments ({packed.path}); use fewer ranks, or more text")
    for training in trainings(recipe, stage):
        division(recipe, stage, training, size)
    return step


def trainings(recipe: Recipe, stage: str) -> list[TrainSettings]:
    """The optimisations of a stage in order, all on the same ranks; none where it does not train."""
    settings = getattr(recipe, stage)
    if isinstance(settings, PruneSettings):
        return [settings, settings.recovery] if settings.method == "cofi" else [settings.recovery]
    return [settings] if isinstance(settings, TrainSettings) else []


def division(recipe: Recipe, stage: str, training: TrainSettings, size: int) -> tuple[int, int]:
    """Rows of a micro-batch and micro-batches of a step on each of `size` ranks.

    Raises UserError when there is no such division, or the DeepSpeed configuration is wrong.
    """
    unit = 1
    if stage == "pretrain" and recipe.pack and recipe.pretrain:
        together = recipe.pretrain.ranks_per_group
        if size % together:
            raise UserError(
                f"pretrain: {size} ranks are not a multiple of pretrain.ranks_per_group {together}; use {max(size // together, 1) * together} ranks"
            )
        unit = recipe.pack.group_size // together
    rows, accumulation = deepspeed_config.division(training.batch_size, unit, training.micro_batch_size, size)
    deepspeed_config.render(training.deepspeed, training, rows=rows, world=size)
    return rows, accumulation


def execute(recipe: Recipe, stage: str, ranks: Ranks) -> None:
    """Make one stage here, as one of `ranks`: nothing to do when it is there, resumed when it is half done.

    Raises UserError when `check` does, or the stage finds a mistake.
    """
    step = check(recipe, stage, ranks.size)
    if step.artifact is not None:
        return
    inputs = {name: artifact for name in step.inputs if (artifact := artifacts.find(recipe.directory, name, step.inputs[name])) is not None}
    logs = recipe.directory / "logs" / step.name
    started = time.time()
    run = importlib.import_module(f"pipeline.stages.{stage}").run
    if not ranks.first:
        partial = recipe.directory / f"{step.name}.partial"
        artifacts.make_directory(partial)
        run(Work(stage, recipe, inputs, partial, logs, ranks))
        ranks.barrier()
        return
    with artifacts.working(recipe.directory, stage, step.fingerprint) as partial:
        metrics = run(Work(stage, recipe, inputs, partial, logs, ranks))
        ranks.barrier()
        shutil.rmtree(partial / "scratch", ignore_errors=True)
        artifacts.publish(partial, stage=stage, digest=step.fingerprint, settings=step.settings, inputs=step.inputs, metrics=metrics, started=started)
