"""Fine-tuned model -> smaller ones of the same task: masks under a constraint, or a ranking at once; removal; recovery."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import artifacts
from pipeline.compression import goals as targets
from pipeline.compression import one_shot, shapes, surgery, teachers
from pipeline.compression.attention_distillation import Origin, origins
from pipeline.compression.distillation import Distillation, label_losses
from pipeline.compression.goals import Goal
from pipeline.compression.latency import Table
from pipeline.compression.layer_distillation import LayerDistillation, layers_left, teacher_layers
from pipeline.compression.masks import Masks
from pipeline.compression.pictures import structure_figure
from pipeline.compression.sparsity import Prunable, realised, within_layers
from pipeline.compression.structure import deaths, structure, table
from pipeline.compression.student import spaced
from pipeline.compression.teachers import Recorded
from pipeline.corpus import tokenizer as tokenizers
from pipeline.errors import UserError
from pipeline.models import build, export, onnx, size, stock
from pipeline.models.modeling_trimline import TrimlinePreTrainedModel
from pipeline.objectives.base import Trainee
from pipeline.recipe import TaskTrainSettings
from pipeline.tasks import metrics
from pipeline.tasks import task as tasks
from pipeline.tasks.augmentation import augmented
from pipeline.tasks.batches import TaskBatches
from pipeline.tasks.task import Task
from pipeline.training import engine
from pipeline.training.loop import Summary, Watch, train
from pipeline.training.telemetry import METRICS
from pipeline.workflow import Work

MASKING, MASKED, REMOVED, RECOVERY = "masking", "masked", "removed", "recovery"
"""Below the scratch directory of each goal, to resume from: checkpoints, the student with its masks apart, the best model after the removal,
checkpoints."""
SAID, TEXTS = "teacher", "augmented.json"
"""Below the scratch directory: what the teacher says of each training row; the task with copies of training examples."""
MASKS, CHOICE = "masks.safetensors", "choice.json"
"""Beside the removed model: the masks it was removed by, and how they came about."""

MISSED = 0.2
"""How far from what it is to keep a masked student may end without a word, as a share of that: .913 for .95 keeps three quarters too much."""


def run(work: Work) -> dict[str, Any]:
    pruning = _Pruning(work)
    before = None
    for goal in pruning.goals:
        if pruning.settings.method == "cofi":
            before = pruning.mask(goal, before)
        else:
            pruning.pick(goal)
        pruning.recover(goal)
    return pruning.publish() if work.ranks.first else {}


class _Pruning:
    """The parts of the stage, which every rank calls alike."""

    def __init__(self, work: Work) -> None:
        assert work.recipe.prune is not None
        self.work, self.settings, self.seed = work, work.recipe.prune, work.recipe.seed
        self.finetuned = work.input("finetune") / "model"
        self.tokenizer = tokenizers.load(self.finetuned)
        self.task = tasks.open(work.input("finetune") / "task.json")
        self.device = engine.start()  # ranks wait for one another before anything is trained
        self.dense = self._load(self.finetuned)
        self.prunable = Prunable.of(self.dense.config)
        if self.settings.onnx:
            onnx.check()
        if "hidden" in self.settings.sparsity.units:
            surgery.check_dimensions(self.dense.config)
        if not self.task.splits["dev"]:
            raise UserError(f"{work.input('finetune') / 'task.json'}: the development split is empty, the best student could not be told")
        self.examples = self._examples()
        self.taught: tuple[int, ...] = ()
        self.teacher = self._teacher()
        self.goals = self._goals()

    def mask(self, goal: Goal, before: Masks | None) -> Masks:
        """The student, trained with masks on its units until they remove what the goal asks; the best of what they made it is kept, without them."""
        settings, scratch = self.settings, self._scratch(goal)
        batches = self.batches(settings)
        steps = math.ceil(settings.epochs * batches.steps_per_epoch)
        masks = Masks(
            self.prunable, settings.sparsity, target=goal.share, steps=steps, seed=self.seed, removed=goal.removed, head_share=goal.head_share,
            before=before,
        )  # fmt: skip
        best = _Best(self, goal, masks, steps, max(1, round(settings.sparsity.evaluate_every * batches.steps_per_epoch)))
        student = self._load(self.finetuned if before is None else self._scratch(self.goals[self.goals.index(goal) - 1]) / MASKED)
        summary = self._distil(student, batches, settings, goal, MASKING, masks=masks, watch=best)
        if summary.weights is not None:
            export.save(student, self.tokenizer, scratch / MASKED, summary.weights)
        expected = masks.expected_sparsity().item()
        if self.work.ranks.first and abs(expected - goal.share) > MISSED * (1 - goal.share):
            print(
                f"prune: {goal.name}: the masks ended at an expected sparsity of {expected:.3f}, the target is {goal.share:.3g}; a common threshold "
                "made up the difference; more epochs, or a higher sparsity.mask_lr, bring them nearer",
                flush=True,
            )
        self.work.ranks.barrier()
        return masks

    def pick(self, goal: Goal) -> None:
        """Removes at once what method one-shot ranks lowest, or all but what makes a smaller student."""
        if self.work.ranks.first and self.choice(goal) is None:
            if self.settings.method == "student":
                assert goal.shape is not None
                masks = spaced(self.dense, goal.shape)
            else:
                masks = self._ranked(goal)
            self.keep(goal, self.remove(self.dense, masks, goal), masks, {"removed": realised(goal.removed, masks).item()})
        self.work.ranks.barrier()

    def _ranked(self, goal: Goal) -> dict[str, Tensor]:
        """Units by what the labels' loss loses without them, the best of them kept."""
        settings = self.settings
        batches = TaskBatches(self.task.splits["train"], self.tokenizer, self.task, settings.micro_batch_size, self.seed)
        rows = (
            {name: torch.from_numpy(array).to(self.device) for name, array in batch.items()} for batch in batches.first(settings.one_shot.examples)
        )
        model = self._load(self.finetuned).to(self.device)  # type: ignore[arg-type]
        found = one_shot.importance(model, rows, partial(label_losses, model), units=settings.sparsity.units)
        if goal.shape is not None:
            return shapes.to_shape(found, goal.shape, self.prunable)
        assert goal.head_share is not None  # the recipe was checked
        widths = {"multiple": settings.multiple_of, "head_dim": self.dense.config.head_dim}
        chosen = one_shot.choose(found, goal.removed, goal.share, head_share=goal.head_share, **widths)
        return targets.dealt(chosen, within_layers(found), goal, **widths)

    def recover(self, goal: Goal) -> None:
        """What is left, trained from the teacher once more."""
        removed = self._scratch(goal) / REMOVED
        student, masks = self._load(removed), load_file(removed / MASKS)
        kept = masks["hidden"].nonzero().flatten() if "hidden" in masks else None
        recovery, heads = self.settings.recovery, origins(masks, self.prunable)
        summary = self._distil(student, self.batches(recovery), recovery, goal, RECOVERY, kept=kept, heads=heads)
        if summary.weights is not None:
            export.save(student, self.tokenizer, self._made(goal), summary.weights)

    def publish(self) -> dict[str, Any]:
        """Scores, structures, and the last model as the stage's own."""
        teacher = self.score(self._load(self.finetuned))
        *others, last = self.goals
        if self.settings.onnx:
            for goal in self.goals:
                onnx.export(self._load(self._made(goal)), self._made(goal) / "model.onnx")
        entries = [self._entry(goal, teacher) for goal in self.goals]
        if others:
            shutil.copytree(self._made(last), self.work.directory / "model", dirs_exist_ok=True)
        artifacts.write_json(self.work.directory / "structure.json", entries)
        suffixed = {f"{name}_{entry['name']}": value for entry in entries[:-1] for name, value in entry["figures"].items()}
        return entries[-1]["figures"] | suffixed

    def _entry(self, goal: Goal, teacher: float) -> dict[str, Any]:
        removed = self._scratch(goal) / REMOVED
        masks, choice = load_file(removed / MASKS), self.choice(goal) or {}
        left = structure(masks, self.prunable)
        Console().print(table(left))
        structure_figure(left, f"{self.work.recipe.name}, {goal.name}").savefig(self.work.directory / f"structure-{goal.name}.png")
        scores = {"teacher": teacher, "removed": self.score(self._load(removed)), "recovered": self.score(self._load(self._made(goal)))}
        config, dense = self._load(removed).config, self.dense.config
        if self.settings.sparsity.speed_up:
            target = {
                "target_speed_up": round(1 / (1 - goal.share), 2),
                "predicted_speed_up": round(1 / (1 - realised(goal.removed, masks).item()), 2),
            }
        else:
            target = {"target_sparsity": round(goal.share, 4), **{name: choice[name] for name in ("expected_sparsity",) if name in choice}}
        figures = {
            **target,
            "realised_sparsity": round(1 - size.block_parameters(config) / size.block_parameters(dense), 4),
            **{f"dev_{self.task.metric}_{name}": round(score, 4) for name, score in scores.items()},
        }
        went = deaths(self._records(goal))
        if went:
            order = ", ".join(f"{death.sublayer} {death.layer} (step {death.step})" for death in went)
            print(f"prune to {goal.name}: layers that masks took, the first first: {order}", flush=True)
        return {"name": goal.name, "figures": figures, "choice": choice, **left, "deaths": [death._asdict() for death in went]}

    def _records(self, goal: Goal) -> list[dict[str, Any]]:
        """What was logged of masking, a record a step; none in one shot."""
        path = self.work.logs / goal.name / MASKING / METRICS
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    # -- parts of these --

    def remove(self, model: TrimlinePreTrainedModel, masks: Mapping[str, Tensor], goal: Goal) -> TrimlinePreTrainedModel:
        """Without what the masks take; of a shape that stock classes have, so that they can load it."""
        removed = surgery.remove(model, masks)
        if goal.shape is None:
            return removed
        removed = surgery.compact(removed)
        stock = goal.shape.is_stock(self.prunable) and removed.config.positions == "absolute"
        return surgery.forget_width(removed) if stock else removed

    def keep(self, goal: Goal, removed: TrimlinePreTrainedModel, masks: Mapping[str, Tensor], choice: dict[str, Any]) -> None:
        """Whole or not at all."""
        place = self._scratch(goal) / REMOVED
        new = place.with_name(f"{REMOVED}.new")
        shutil.rmtree(new, ignore_errors=True)
        export.save(removed, self.tokenizer, new)
        save_file({unit: mask.contiguous().cpu() for unit, mask in masks.items()}, new / MASKS)
        artifacts.write_json(new / CHOICE, choice)
        shutil.rmtree(place, ignore_errors=True)
        new.rename(place)

    def choice(self, goal: Goal) -> dict[str, Any] | None:
        """What `keep` was told of the model that is kept; None before any is."""
        path = self._scratch(goal) / REMOVED / CHOICE
        return json.loads(path.read_text()) if path.is_file() else None

    def batches(self, training: TaskTrainSettings) -> TaskBatches:
        """As that training takes them."""
        return self.rows(training.batch_size, by_length=training.group_by_length)

    def rows(self, batch_size: int, *, by_length: bool = False) -> TaskBatches:
        return TaskBatches(self.examples, self.tokenizer, self.task, batch_size, self.seed, by_length=by_length)

    def score(self, model: Any) -> float:
        """By the task's own metric, on the development split."""
        return metrics.evaluate(model, self.tokenizer, self.task, "dev", self.settings.micro_batch_size, self.device)[self.task.metric]

    def _distil(
        self,
        student: TrimlinePreTrainedModel,
        batches: TaskBatches,
        training: TaskTrainSettings,
        goal: Goal,
        phase: str,
        *,
        masks: Masks | None = None,
        kept: Tensor | None = None,
        heads: Sequence[Origin] | None = None,
        watch: Watch | None = None,
    ) -> Summary:
        """The teacher into the student, with the masks in it or without."""
        settings, layers = self.settings.distillation, None
        if self.taught:
            rule = settings.recovery_mapping if masks is None else settings.mapping
            width, left = self.dense.config.hidden_size, layers_left(student.config)
            layers = LayerDistillation(self.taught, width, rule=rule, left=left, kept=kept)
        objective = Distillation(self.teacher, settings, masks, layers, heads)
        student.get_input_embeddings().requires_grad_(not training.freeze_embeddings)
        saved, student.config.unpadded = student.config.unpadded, self.work.recipe.model.unpadded
        summary = train(
            Trainee(student, objective, side=masks),
            batches,
            training,
            steps=math.ceil(training.epochs * batches.steps_per_epoch),
            seed=self.seed,
            directory=self._scratch(goal) / phase,
            logs=self.work.logs / goal.name / phase,
            ranks=self.work.ranks,
            loss_weights=objective.loss_weights,
            title=f"prune to {goal.name}, {phase}",
            watch=watch,
        )
        student.config.unpadded = saved  # stock directories say nothing of it
        return summary

    def _goals(self) -> list[Goal]:
        """What is to be reached; a speed-up by a table of this machine, which the first rank measures."""
        path, sparsity = self.work.scratch / "latency.json", self.settings.sparsity
        if self.settings.method == "student":
            sparsity = sparsity.model_copy(update={"units": ("heads", "neurons", "attention")})  # what tells sizes apart; nothing is ranked
        timed = bool(sparsity.speed_up)
        if timed and self.work.ranks.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            targets.measured(sparsity, self.dense.config, path, self.device)
        self.work.ranks.barrier()
        times = Table.open(path) if timed else None
        together = self.settings.method == "one-shot" and sparsity.head_share not in (0, 1)
        return targets.goals(sparsity, self.prunable, times, multiple=self.settings.multiple_of, together=together)

    def _examples(self) -> Sequence[Any]:
        """What is learnt from: the training split, and the copies of it that were asked for, made once, that ranks and what resumes have the same."""
        copies, path = self.settings.distillation.augment, self.work.scratch / TEXTS
        if not copies or not isinstance(self.task, Task):
            return self.task.splits["train"]
        if self.work.ranks.first and not path.is_file():
            embeddings: Any = self.dense.get_input_embeddings()
            found = augmented(self.task.splits["train"], self.tokenizer, embeddings.weight.detach(), copies, self.seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(self.task, splits={"train": found}).save(path)
        self.work.ranks.barrier()
        return tasks.open(path).splits["train"]

    def _teacher(self) -> TrimlinePreTrainedModel | Recorded:
        settings = self.settings.distillation
        labels = self.task.labels if isinstance(self.task, Task) else None
        if settings.teacher_outputs is not None:
            return Recorded(teachers.outputs(settings.teacher_outputs, len(self.task.splits["train"]), len(labels or ()) or 1))
        teacher = self._load(self.finetuned if settings.teacher is None else Path(settings.teacher))
        if settings.teacher is not None:
            teachers.check(teacher, self.dense, labels, layers=settings.layers > 0, heads=settings.attention > 0)
            build.check_fits(teacher, self.tokenizer, self.task.max_length)
            if self.task.head == "qa":
                teachers.check_answers(Path(settings.teacher))
        teacher.config.unpadded = self.work.recipe.model.unpadded
        if settings.layers:
            self.taught = teacher_layers(len(teacher.config.heads_per_layer))
        rows = self.rows(self.settings.micro_batch_size)
        gib = teachers.size(teacher, rows, self.taught) / 2**30
        if settings.attention or gib > settings.record:
            if self.work.ranks.first and not settings.attention:
                print(
                    f"prune: what the teacher says of {len(rows.lengths):,} rows takes {gib:.2f} GiB, more than distillation.record, "
                    f"{settings.record:g}: it runs in every step",
                    flush=True,
                )
            return teacher
        said = self.work.scratch / SAID
        if self.work.ranks.first and not said.is_dir():
            print(f"prune: what the teacher says of {len(rows.lengths):,} rows is written down once, {gib:.2f} GiB", flush=True)
            teachers.record(teacher, rows, self.taught, said, self.device)
        self.work.ranks.barrier()
        return teachers.recorded(said, rows, self.taught)

    def _load(self, directory: Path) -> TrimlinePreTrainedModel:
        model = build.load(directory, head=self.task.head)
        if not isinstance(model, TrimlinePreTrainedModel):
            why = stock.unlike(model.config)
            raise UserError(f"{directory}: a {type(model).__name__} cannot be pruned: {why}; prune takes Trimline's own models, BERT's and RoBERTa's")
        return model

    def _scratch(self, goal: Goal) -> Path:
        return self.work.scratch / goal.name

    def _made(self, goal: Goal) -> Path:
        return self.work.directory / (f"models/{goal.name}" if len(self.goals) > 1 else "model")


class _Best:
    """A watch on the masked student once its target is at its full: what removal would make of it is scored, and the best kept.

    Every candidate is at the target, so that scores alone decide; of equal ones the later. every: steps between them; the last step's is one.
    """

    def __init__(self, pruning: _Pruning, goal: Goal, masks: Masks, steps: int, every: int) -> None:
        self.pruning, self.goal, self.masks, self.steps, self.every = pruning, goal, masks, steps, every

    def __call__(self, step: int, weights: Callable[[], dict[str, Tensor] | None]) -> None:
        since = step - self.masks.hold
        if step < self.steps and (since <= 0 or since % self.every):
            return
        full = weights()
        if full is None:
            return
        pruning, goal = self.pruning, self.goal
        settled, shifts = targets.settle(self.masks, goal, pruning.settings.multiple_of)
        student = copy.deepcopy(pruning.dense)
        student.load_state_dict(full)
        removed = pruning.remove(student, settled, goal)
        score, before = pruning.score(removed), pruning.choice(goal)
        print(f"prune to {goal.name}: after step {step} {pruning.task.metric} {score:.4f} on the development split, without what the masks take")
        if before is None or score >= before["dev_score"]:
            expected = round(self.masks.expected_sparsity().item(), 4)
            pruning.keep(goal, removed.cpu(), settled, {"step": step, "dev_score": score, "expected_sparsity": expected, "shifts": shifts})
