"""One YAML recipe -> typed, checked settings for every stage.

A recipe may leave stages out; `extends:` names one parent; `key=value` overrides come last. Every error names the file,
the line, what was found and what to do (`RecipeError`).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from pipeline.compression.settings import DistillationSettings, OneShotSettings, SparsitySettings
from pipeline.corpus.settings import TokenizeSettings
from pipeline.errors import UserError
from pipeline.evaluation.settings import EvaluateSettings
from pipeline.launch.settings import SlurmSettings
from pipeline.memory.settings import IndexSettings
from pipeline.models.settings import ModelSettings
from pipeline.objectives.settings import (
    AnyObjective,
    CausalSettings,
    DistillSettings,
    MlmSettings,
    NotesSettings,
    ReplacedTokenSettings,
    TrimeSettings,
)
from pipeline.packing.settings import PackSettings
from pipeline.settings import Settings, setting
from pipeline.tasks.settings import TaskSettings
from pipeline.training.settings import TrainSettings

STAGES = ("tokenize", "pack", "pretrain", "index", "finetune", "prune", "evaluate")


class RecipeError(UserError):
    """Something in a recipe is wrong."""


class PretrainSettings(TrainSettings):
    objective: AnyObjective = setting(MlmSettings(), "What the model learns to predict.")
    sparsity: SparsitySettings | None = setting(
        None, "Prune the model while it is pretrained, before any task, with the objective as the loss; what is left goes on. null: keep it whole."
    )
    notes: NotesSettings | None = setting(None, "Notes on rare words, read while pretraining and thrown away after it. null: none.")
    steps: int = setting(1000, "Optimiser steps.", unit="steps", ge=1)
    document_mask: bool = setting(False, "Attention stays inside a document, and positions restart in each; for rows that hold several documents.")
    loss_weights: dict[str, float] = setting({}, "Weight of each named loss in the sum; the objective's own, or 1, where not named.")
    ranks_per_group: int = setting(
        1, "Ranks that hold equal parts of each group of segments and gather its memory from one another.", unit="ranks", ge=1, result=False
    )


class TaskTrainSettings(TrainSettings):
    """An optimisation measured in passes over a task's training split."""

    epochs: float = setting(3.0, "Passes over the training split.", unit="epochs", gt=0)
    lr: float = setting(5e-5, "Peak learning rate.", gt=0)
    group_by_length: bool = setting(True, "A batch holds examples of about the same length, of those of up to 16 random batches: less padding.")
    freeze_embeddings: bool = setting(False, "Leave the token embeddings as they are: of a small model they are most of the parameters.")


class FinetuneSettings(TaskTrainSettings):
    task: TaskSettings = setting(TaskSettings(embedded=True), "The labelled data.")


class PruneSettings(TaskTrainSettings):
    """Pruning of the fine-tuned model on its own task, then fine-tuning of what is left. Each target has so many epochs, and so many of recovery."""

    method: Literal["cofi", "one-shot", "student"] = setting(
        "cofi",
        "cofi: masks are trained with the student; one-shot: units are ranked once, and what is left recovers, which is simpler and, in equal"
        " time at 95 %, came out as good on five GLUE tasks and 7 points of F1 behind on SQuAD; student: evenly spaced layers of sparsity.shape, with"
        " their heads and neurons of largest weights, and then the recovery too.",
    )
    multiple_of: int = setting(1, "Widths of layers that stay are rounded up to multiples of this, such as 8 or 64. 1: as they come.", ge=1)
    onnx: bool = setting(False, "Write each model as an ONNX graph too, model.onnx beside it; needs trimline[onnx].")
    one_shot: OneShotSettings = setting(OneShotSettings(), "How method one-shot ranks.")
    sparsity: SparsitySettings = setting(SparsitySettings(), "What to remove, and how the masks get there.")
    distillation: DistillationSettings = setting(DistillationSettings(), "How the student learns from the fine-tuned teacher.")
    recovery: TaskTrainSettings = setting(TaskTrainSettings(), "Fine-tuning after the removal.")


class Recipe(Settings):
    """Everything a run needs. A stage whose section is missing is not run."""

    name: str = setting(..., "Name of the run: its directory below `runs_dir`.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = setting(1, "Seeds every draw.", ge=0)
    runs_dir: str = setting("runs", "Where runs are kept.", result=False)
    model: ModelSettings = setting(ModelSettings(), "The transformer.")
    tokenize: TokenizeSettings | None = setting(None, "Documents -> tokenizer and token store.")
    pack: PackSettings | None = setting(None, "Token store -> plan of segments and groups.")
    pretrain: PretrainSettings | None = setting(None, "Plan -> pretrained model.")
    index: IndexSettings | None = setting(None, "Causal model and documents -> datastore of keys and values.")
    finetune: FinetuneSettings | None = setting(None, "Pretrained model -> model of a task.")
    prune: PruneSettings | None = setting(None, "Model of a task -> smaller model of the task.")
    evaluate: EvaluateSettings | None = setting(None, "Every model made -> report.")
    slurm: SlurmSettings = setting(SlurmSettings(), "What `trimline submit` asks of the cluster.", result=False)

    @property
    def stages(self) -> list[str]:
        """The stages this recipe runs, in order."""
        return [stage for stage in STAGES if getattr(self, stage) is not None]

    @property
    def directory(self) -> Path:
        """Where the run's artifacts are published: `runs_dir/name`."""
        return Path(self.runs_dir) / self.name

    @property
    def row_length(self) -> int | None:
        """Tokens of a row in pretraining; None where nothing is packed."""
        return self.pack.length if self.pack else None

    @model_validator(mode="after")
    def _chain(self) -> Recipe:
        if not self.stages:
            raise ValueError(f"the recipe has no stage; give at least one of the sections {', '.join(STAGES)}")
        missing = [
            f"{stage} needs {' or '.join(needs)}"
            for stage, needs in (("pack", ["tokenize"]), ("pretrain", ["pack"]), ("index", ["tokenize"]), ("prune", ["finetune"]))
            if stage in self.stages and not set(needs) & set(self.stages)
        ]
        if missing:
            raise ValueError(f"{'; '.join(missing)}: add the missing section, or leave the stage out")
        if self.finetune and not self.pretrain and self.model.from_ is None:
            raise ValueError("finetune needs a model: add a pretrain section, or model.from: DIR")
        if self.evaluate:
            self._check_evaluate(self.evaluate)
        if self.pretrain:
            self._check_pretrain(self.pretrain)
        if self.index:
            self._check_index(self.index)
        if self.prune:
            self._check_prune(self.prune)
        if self.finetune and self.finetune.task.length > self.model.max_length and self.model.from_ is None and self.model.bounded:
            raise ValueError(f"finetune.task.max_length {self.finetune.task.length} exceeds model.max_length {self.model.max_length}")
        return self

    def _check_prune(self, prune: PruneSettings) -> None:
        sparsity = prune.sparsity
        upstream = self.pretrain.sparsity if self.pretrain else None
        if upstream and (upstream.shape is None or (self.model.from_ is None and upstream.shape.heads < self.model.heads)):
            raise ValueError(
                "prune takes layers that are whole and alike, which pretrain.sparsity does not leave; give pretrain.sparsity.shape with all heads, or"
                " leave prune out"
            )
        if prune.recovery.ranks > 1:
            raise ValueError("prune.recovery.ranks: the recovery runs on the ranks of prune; set prune.ranks")
        if prune.time_budget is not None:
            raise ValueError("prune.time_budget: the masks reach their target by steps, not by time; leave it out (prune.recovery may have one)")
        if self.finetune and self.finetune.task.squad and prune.distillation.teacher_outputs:
            raise ValueError("prune.distillation.teacher_outputs holds logits of labels; finetune.task is squad: leave it out")
        if self.finetune and self.finetune.task.squad and prune.distillation.augment:
            raise ValueError("prune.distillation.augment exchanges words, also those of answers; finetune.task is squad: leave it out")
        if sparsity.shape and prune.multiple_of > 1:
            raise ValueError("prune.multiple_of rounds widths, which sparsity.shape says exactly; leave one of them out")
        if prune.method == "student" and (sparsity.shape is None or sparsity.shape.hidden is not None):
            raise ValueError("prune.method student makes a smaller model of the same width; say how small by sparsity.shape: {layers, heads, ffn}")
        if prune.method == "one-shot" and not {"heads", "neurons"} <= set(sparsity.units):
            raise ValueError(f"prune.method one-shot ranks heads and neurons; sparsity.units are {', '.join(sparsity.units)}: add them")
        if prune.method == "one-shot" and sparsity.head_share is None and not sparsity.shape:
            raise ValueError("prune.method one-shot ranks heads and neurons apart; sparsity.head_share is null: give it a number, such as 0.5")
        if prune.method == "one-shot" and "hidden" in sparsity.units and not sparsity.shape:
            raise ValueError(
                "prune.method one-shot takes dimensions away for a shape alone; leave hidden out of sparsity.units, or give sparsity.shape"
            )

    def _check_index(self, index: IndexSettings) -> None:
        if not self.pretrain and self.model.from_ is None:
            raise ValueError("index needs a model: add a pretrain section, or model.from: DIR")
        if self.model.from_ is None and self.model.kind != "decoder":
            raise ValueError(f"index reads the text with a causal model; model.kind is {self.model.kind}: set it to decoder, or leave index out")
        block, context = index.window.resolved(self.pack.length if self.pack else None)
        if self.model.from_ is None and self.model.bounded and block + context > self.model.max_length:
            raise ValueError(f"index.window: block {block} + context {context} exceeds model.max_length {self.model.max_length}")

    def _check_evaluate(self, evaluate: EvaluateSettings) -> None:
        if not evaluate.memory:
            if not (self.pretrain or self.finetune):
                raise ValueError("evaluate needs a model: add a pretrain or a finetune section")
            return
        if not self.pretrain and self.model.from_ is None:
            raise ValueError("evaluate.memory tests a causal model: add a pretrain section, or model.from: DIR")
        kind = self.pretrain.objective.kind if self.pretrain else self.model.kind
        if kind != "decoder":
            raise ValueError(f"evaluate.memory tests a causal model; this one is an {kind}: set model.kind: decoder, or leave evaluate.memory out")
        if not self.tokenize:
            raise ValueError("evaluate.memory reads held-out documents: add a tokenize section")
        if evaluate.searches and not self.index and evaluate.datastore is None:
            searching = next(memory.name for memory in evaluate.memories if "external" in memory)
            raise ValueError(f"evaluate.memory {searching} looks up a datastore: add an index section, or evaluate.datastore: DIR of another run's")
        block, context = evaluate.windowed(self.row_length)
        if self.model.from_ is None and self.model.bounded and block + context > self.model.max_length:
            raise ValueError(f"evaluate.window: block {block} + context {context} exceeds model.max_length {self.model.max_length}")

    def _check_pretrain(self, pretrain: PretrainSettings) -> None:
        objective, pack = pretrain.objective, self.pack
        assert pack is not None
        if objective.kind != self.model.kind:
            raise ValueError(f"objective {objective.name} trains a model of kind {objective.kind}; model.kind is {self.model.kind}: set it to that")
        if self.model.from_ is None and pack.length > self.model.max_length:
            raise ValueError(f"pack.length {pack.length} exceeds model.max_length {self.model.max_length}")
        if objective.needs == "groups" and pack.group_size < 2:
            raise ValueError(f"objective {objective.name} needs groups of two or more; pack makes groups of {pack.group_size}")
        if pack.groups not in objective.groups:
            raise ValueError(f"objective {objective.name} needs pack.groups {' or '.join(objective.groups)}; it is {pack.groups}")
        if pretrain.time_budget is not None and isinstance(objective, TrimeSettings) and objective.ce_warmup_ratio:
            raise ValueError(
                f"pretrain.time_budget: objective {objective.name} begins without memory for a share of the steps, which a budget does not tell; "
                "set objective.ce_warmup_ratio: 0, or leave the budget out"
            )
        if isinstance(objective, DistillSettings):
            self._check_distill(objective)
        if pretrain.sparsity:
            self._check_upstream(pretrain, pretrain.sparsity)
        if pretrain.notes:
            self._check_notes(pretrain.notes, objective)
        if pretrain.ranks_per_group > 1 and (objective.needs != "groups" or pack.group_size % pretrain.ranks_per_group):
            raise ValueError(
                f"pretrain.ranks_per_group {pretrain.ranks_per_group} divides groups of segments that share a memory (trimelm_long, trimelm_ext); "
                f"objective {objective.name} has groups of {pack.group_size if objective.needs == 'groups' else 1}: set it to a divisor of that"
            )
        if pretrain.batch_size % pack.group_size:
            raise ValueError(f"pretrain.batch_size {pretrain.batch_size} is not a multiple of pack.group_size {pack.group_size}")
        new = self.model if self.model.from_ is None else None
        if new and isinstance(objective, ReplacedTokenSettings) and (larger := objective.generator.larger_than(new.layers, new.heads, new.ffn)):
            raise ValueError(larger)
        if self.finetune and self.model.kind == "decoder" and self.model.from_ is None:
            raise ValueError("finetune classifies with an encoder; model.kind is decoder: leave finetune out, or use kind: encoder")

    def _check_distill(self, objective: DistillSettings) -> None:
        if self.model.from_ is None:
            raise ValueError("objective distill has the model of model.from as its teacher: set model.from: DIR")
        if objective.student is None and not (self.pretrain and self.pretrain.sparsity):
            raise ValueError("objective distill needs a student smaller than its teacher: give objective.student, or prune it by pretrain.sparsity")

    def _check_upstream(self, pretrain: PretrainSettings, sparsity: SparsitySettings) -> None:
        objective = pretrain.objective
        if not isinstance(objective, MlmSettings | DistillSettings | CausalSettings) or (isinstance(objective, CausalSettings) and objective.chunk):
            raise ValueError(f"pretrain.sparsity prunes under mlm, distill and causal without chunk, not under this {objective.name}; leave it out")
        if isinstance(objective, DistillSettings) and objective.attention:
            raise ValueError("pretrain.sparsity has masks on heads, whose attention objective.attention would teach: set objective.attention: 0")
        if pretrain.notes:
            raise ValueError("pretrain.sparsity and pretrain.notes both act beside the model; leave one of them out")
        if sparsity.speed_up or (len(sparsity.target) > 1 and not sparsity.shape):
            raise ValueError("pretrain.sparsity takes one target, or a shape; speed_up and several targets are for prune")
        if pretrain.time_budget is not None:
            raise ValueError("pretrain.time_budget: the masks of pretrain.sparsity reach their target by steps, not by time; leave one of them out")

    def _check_notes(self, notes: NotesSettings, objective: AnyObjective) -> None:
        low, high = notes.frequency
        if not 1 <= low <= high:
            raise ValueError(f"pretrain.notes.frequency [{low}, {high}]: expected the least and the most occurrences of a word, 1 <= from <= to")
        if objective.kind != "encoder" or isinstance(objective, DistillSettings):
            raise ValueError(
                f"pretrain.notes are of the words on both sides, which objective {objective.name} does not see: leave notes out, or use mlm, "
                "electra or meta_controller"
            )


# -- loading ---------------------------------------------------------------------------------------------------------


At = tuple[str | int, ...]


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, extend, override and check one recipe.

    overrides: `dotted.key=value` strings, the value in YAML.
    Raises RecipeError naming the file and line of what is wrong.
    """
    merged, origin = _read_with_parent(Path(path))
    for override in overrides:
        _override(merged, origin, override)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(_explain(error, origin, str(path))) from None


def _read_with_parent(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[At, str]]:
    """One file merged over the parent it extends; and where each key path was written (`file:line`)."""
    if path.resolve() in seen:
        raise RecipeError(f"{path}: extends itself through {' -> '.join(map(str, seen))}")
    data, origin = _read(path)
    parent = data.pop("extends", None)
    if parent is None:
        return data, origin
    if not isinstance(parent, str):
        raise RecipeError(f"{origin[('extends',)]}: extends takes one path, found {parent!r}")
    base, base_origin = _read_with_parent(path.parent / parent, (*seen, path.resolve()))
    return _merge(base, data), base_origin | origin


def _read(path: Path) -> tuple[dict[str, Any], dict[At, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}); save the recipe as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)}), found {type(data).__name__}")
    origin: dict[At, str] = {}
    _locate(node, (), str(path), origin)
    return data, origin


def _locate(node: yaml.Node | None, at: At, file: str, origin: dict[At, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        written: set[str] = set()
        for key, value in node.value:
            if key.value in written:
                raise RecipeError(f"{file}:{key.start_mark.line + 1}: {key.value} is given twice; keep one")
            written.add(key.value)
            below = (*at, key.value)
            origin[below] = f"{file}:{key.start_mark.line + 1}"
            _locate(value, below, file, origin)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*at, index)
            origin[below] = f"{file}:{value.start_mark.line + 1}"
            _locate(value, below, file, origin)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(data: dict[str, Any], origin: dict[At, str], text: str) -> None:
    dotted, equals, raw = text.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {text!r}: expected key=value, for example pretrain.steps=200")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise RecipeError(f"override {text!r}: {raw!r} is not a YAML value") from None
    section = data
    for depth, key in enumerate(keys[:-1]):
        if section.get(key) is None:
            section[key] = {}
        if not isinstance(section[key], dict):
            raise RecipeError(f"override {text!r}: {'.'.join(keys[: depth + 1])} is not a section")
        section = section[key]
    section[keys[-1]] = value
    for depth in range(1, len(keys) + 1):
        origin[tuple(keys[:depth])] = f"override {text!r}"


# -- messages --------------------------------------------------------------------------------------------------------


def _explain(error: ValidationError, origin: dict[At, str], file: str) -> str:
    return "\n".join(dict.fromkeys(_explain_one(dict(problem), origin, file) for problem in error.errors()))


def _explain_one(problem: dict[str, Any], origin: dict[At, str], file: str) -> str:
    at: At = tuple(part for part in problem["loc"])
    if len(at) > 2 and at[:2] == ("pretrain", "objective"):  # pydantic puts the union's tag into the path
        at = (*at[:2], *at[3:])
    where = next((origin[at[:depth]] for depth in range(len(at), 0, -1) if at[:depth] in origin), file)
    key = ".".join(map(str, at))
    if problem["type"] == "extra_forbidden":
        known = list(_fields_at(at[:-1], problem))
        close = difflib.get_close_matches(str(at[-1]), known, n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key {key!r}; {remedy}"
    if problem["type"] == "missing":
        return f"{where}: {key} is missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if not key else f"{where}: {key}: {message}"
    return f"{where}: {key}: {message[0].lower()}{message[1:]}, found {problem['input']!r}"


def _fields_at(at: At, problem: dict[str, Any]) -> list[str]:
    section: Any = Recipe
    for part in at:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, BaseModel) else None
        if field is None:
            return []
        models = _models_in(field.annotation)
        if part == "objective" and len(problem["loc"]) > 2:
            models = [m for m in models if m.model_fields["name"].default == problem["loc"][2]] or models
        if not models:
            return []
        section = models[0]
    return [field.alias or name for name, field in section.model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def explain(key: str) -> str:
    """What a recipe key means: description, unit, type, default, and the keys below it.

    Raises RecipeError with the nearest key when there is none of that name.
    """
    section: type[BaseModel] = Recipe
    field = None
    parts = key.split(".") if key else []
    for depth, part in enumerate(parts):
        named = {f.alias or n: f for n, f in section.model_fields.items()}
        if part not in named:
            close = difflib.get_close_matches(part, named, n=1, cutoff=0.5)
            above = ".".join(parts[:depth])
            remedy = f"did you mean {'.'.join([*parts[:depth], close[0]])!r}?" if close else f"known here: {', '.join(named)}"
            raise RecipeError(f"unknown key {key!r} in {above or 'a recipe'}; {remedy}")
        field = named[part]
        models = _models_in(field.annotation)
        if depth < len(parts) - 1:
            if not models:
                raise RecipeError(f"unknown key {key!r}; {'.'.join(parts[: depth + 1])} has no keys below it")
            section = next((m for m in models if parts[depth + 1] in m.model_fields), models[0])
    lines = [] if field is None else [_describe(key, field)]
    below = [Recipe] if field is None else _models_in(field.annotation)
    for model in below:
        heading = (model.__doc__ or model.__name__).strip().splitlines()[0] if len(below) > 1 else None
        lines += [f"\n{heading}"] if heading else []
        lines += [f"  {_describe(f.alias or n, f)}" for n, f in model.model_fields.items()]
    return "\n".join(lines)


def _describe(key: str, field: Any) -> str:
    unit = (field.json_schema_extra or {}).get("unit")
    if field.is_required():
        default = "required"
    elif isinstance(field.default, BaseModel):
        default = "section"
    else:
        default = f"default {field.default!r}"
    return f"{key}: {field.description or ''} [{', '.join(filter(None, [unit, default]))}]"
