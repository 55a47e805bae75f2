"""Fine-tuned model -> a smaller one of the same task: masks under a sparsity constraint, removal, recovery."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import artifacts
from pipeline.compression import surgery
from pipeline.compression.distillation import Distillation
from pipeline.compression.masks import Masks
from pipeline.compression.sparsity import Prunable
from pipeline.compression.structure import structure, table
from pipeline.corpus import tokenizer as tokenizers
from pipeline.errors import UserError
from pipeline.models import build, export, size
from pipeline.models.modeling_trimline import TrimlineForSequenceClassification
from pipeline.objectives.base import Trainee
from pipeline.recipe import TaskTrainSettings
from pipeline.tasks import metrics
from pipeline.tasks import task as tasks
from pipeline.tasks.batches import TaskBatches
from pipeline.tasks.task import Task
from pipeline.training.loop import Summary, train
from pipeline.workflow import Work

MASKING, REMOVED, RECOVERY = "masking", "removed", "recovery"
"""Below the scratch directory, to resume from: checkpoints, the model right after the removal, checkpoints."""

MISSED = 0.05
"""How far from its target the expected sparsity may end without a word."""


def run(work: Work) -> dict[str, Any]:
    recipe, settings = work.recipe, work.recipe.prune
    assert settings is not None
    assert recipe.finetune is not None
    finetuned = work.input("finetune") / "model"
    tokenizer = tokenizers.load(finetuned)
    task = tasks.open(work.input("finetune") / "task.json")
    assert isinstance(task, Task)  # the recipe was checked

    def steps_of(training: TaskTrainSettings) -> int:
        return math.ceil(training.epochs * len(task.splits["train"]) / training.batch_size)

    def distil(student: TrimlineForSequenceClassification, training: TaskTrainSettings, phase: str, masks: Masks | None = None) -> Summary:
        """The fine-tuned model into the student, with the masks in it or without."""
        objective = Distillation(_load(finetuned), settings.distillation, masks)
        batches = TaskBatches(task.splits["train"], tokenizer, task, training.batch_size, recipe.seed)
        return train(
            Trainee(student, objective, side=masks),
            batches,
            training,
            steps=steps_of(training),
            seed=recipe.seed,
            directory=work.scratch / phase,
            logs=work.logs / phase,
            ranks=work.ranks,
            loss_weights=objective.loss_weights,
            title=f"prune, {phase}",
        )

    dense = _load(finetuned)
    masks = Masks(Prunable.of(dense.config), settings.sparsity, target=settings.sparsity.target, steps=steps_of(settings), seed=recipe.seed)
    masked = distil(_load(finetuned), settings, MASKING, masks)
    if work.ranks.first:
        assert masked.weights is not None
        final_masks, shifts = masks.settle()
        student = _load(finetuned)
        student.load_state_dict(masked.weights)
        removed = surgery.remove(student, final_masks)
        export.save(removed, tokenizer, work.scratch / REMOVED)
    work.ranks.barrier()

    recovered = distil(_load(work.scratch / REMOVED), settings.recovery, RECOVERY)
    if not work.ranks.first:
        return {}
    export.save(removed, tokenizer, work.directory / "model", recovered.weights)
    left = structure(final_masks, masks.prunable)
    Console().print(table(left))
    device = masks.lagrangian.multipliers.device  # where training was
    scores = {
        name: metrics.evaluate(_load(directory), tokenizer, task, "dev", settings.micro_batch_size, device)[task.metric]
        for name, directory in (("teacher", finetuned), ("removed", work.scratch / REMOVED), ("recovered", work.directory / "model"))
    }
    target, expected = settings.sparsity.target, masks.expected_sparsity().item()
    if abs(expected - target) > MISSED:
        print(
            f"prune: the masks ended at an expected sparsity of {expected:.3f}, the target is {target:g}; a common threshold made up the difference,"
            " which costs more than masks that got there: give prune more epochs, or a higher sparsity.mask_lr",
            flush=True,
        )
    figures = {
        "target_sparsity": target,
        "expected_sparsity": round(expected, 4),
        "realised_sparsity": round(1 - size.block_parameters(removed.config) / size.block_parameters(dense.config), 4),
        **{f"dev_{task.metric}_{name}": round(score, 4) for name, score in scores.items()},
    }
    artifacts.write_json(work.directory / "structure.json", {**figures, "shifts": shifts, **left})
    return figures


def _load(directory: Path) -> TrimlineForSequenceClassification:
    model = build.load(directory, head="classification")
    if not isinstance(model, TrimlineForSequenceClassification):
        raise UserError(f"{directory}: a {type(model).__name__} cannot be pruned; prune takes models that Trimline made and stock BERT's")
    return model
