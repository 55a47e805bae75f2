"""A pretrained model and a labelled task -> a model of the task."""

from __future__ import annotations

import math
from typing import Any

import torch

from pipeline.corpus import tokenizer as tokenizers
from pipeline.models import build, export
from pipeline.objectives.base import Trainee
from pipeline.objectives.classify import Classify
from pipeline.objectives.span import Span
from pipeline.tasks import metrics
from pipeline.tasks import task as tasks
from pipeline.tasks.batches import TaskBatches
from pipeline.tasks.task import Task
from pipeline.training.loop import train
from pipeline.workflow import Work

OBJECTIVES = {"classification": Classify, "qa": Span}
"""The head of a task -> what is learnt under it."""


def run(work: Work) -> dict[str, Any]:
    recipe, settings = work.recipe, work.recipe.finetune
    assert settings is not None
    task = tasks.load(settings.task, recipe.seed)
    if work.ranks.first:
        for remark in task.remarks:
            print(f"finetune: {remark}", flush=True)
    start = work.input("pretrain") / "model" if recipe.pretrain else recipe.model.from_
    assert start is not None
    tokenizer = tokenizers.load(start)
    batches = TaskBatches(task.splits["train"], tokenizer, task, settings.batch_size, recipe.seed, by_length=settings.group_by_length)

    torch.manual_seed(recipe.seed)  # every rank draws the same head
    options: dict[str, Any] = {"head": task.head, "trust_remote_code": recipe.model.trust_remote_code}
    labels: dict[str, Any] = {"labels": task.labels, "regression": task.regression} if isinstance(task, Task) else {}
    model = build.load(start, **labels, **options)
    build.adopt(model, recipe.model)
    build.check_fits(model, tokenizer, task.max_length)
    model.get_input_embeddings().requires_grad_(not settings.freeze_embeddings)
    summary = train(
        Trainee(model, OBJECTIVES[task.head]()),
        batches,
        settings,
        steps=math.ceil(settings.epochs * batches.steps_per_epoch),
        seed=recipe.seed,
        directory=work.scratch,
        logs=work.logs,
        ranks=work.ranks,
        title="finetune",
    )
    if not work.ranks.first:
        return {}
    task.save(work.directory / "task.json")
    export.save(model, tokenizer, work.directory / "model", summary.weights)
    saved = build.load(work.directory / "model", **options)  # scored as others will load it
    scores = metrics.evaluate(saved, tokenizer, task, "dev", settings.micro_batch_size, next(model.parameters()).device)
    return {
        **{f"dev_{name}": round(value, 4) for name, value in scores.items()},
        **{f"loss_{name}": round(value, 4) for name, value in summary.losses.items()},
        "steps": summary.steps,
        "tokens_per_second": round(summary.tokens_per_second),
    }
