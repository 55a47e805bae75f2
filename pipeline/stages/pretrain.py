"""Plan and token store -> a pretrained model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rich.console import Console

from pipeline import artifacts, objectives
from pipeline.compression import goals, surgery
from pipeline.compression.general import GeneralDistillation, Upstream
from pipeline.compression.masks import Masks
from pipeline.compression.sparsity import Prunable
from pipeline.compression.structure import structure, table
from pipeline.compression.student import student
from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.store import Store
from pipeline.errors import UserError
from pipeline.models import build, export, size, stock
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlinePreTrainedModel
from pipeline.objectives.base import Objective, Trainee
from pipeline.objectives.notes import Notes
from pipeline.objectives.settings import CausalSettings, DistillSettings, TrimeSettings
from pipeline.packing import word_counts
from pipeline.packing.loader import Loader
from pipeline.packing.plan import Plan
from pipeline.recipe import Recipe
from pipeline.training import engine as engines
from pipeline.training.loop import train
from pipeline.workflow import Work


def run(work: Work) -> dict[str, Any]:
    recipe, settings = work.recipe, work.recipe.pretrain
    assert settings is not None
    tokenizer = tokenizers.load(work.input("tokenize") / "tokenizer")
    plan = Plan.open(work.input("pack") / "train")
    store = Store.open(work.input("tokenize") / "train")
    together: dict[str, Any] = {"ranks_per_group": settings.ranks_per_group}

    torch.manual_seed(recipe.seed)  # every rank starts from the same weights
    model = starting_model(recipe, tokenizer, plan.length)
    rare = None
    if settings.notes:
        engines.start()  # the ranks meet, and wait for the one that counts
        rare = word_counts.rare(settings.notes.frequency, store, tokenizer, work.ranks, work.scratch)
    channels = {"places": settings.objective.needs_places, "words": settings.objective.needs_words, "document_mask": settings.document_mask}
    batches = Loader(plan, store, tokenizer, settings.batch_size, recipe.seed, rare=rare, **channels, **together)
    objective: Objective
    if isinstance(settings.objective, DistillSettings):
        teacher, smaller = model, settings.objective.student
        model = copy.deepcopy(teacher) if smaller is None else student(teacher, smaller)  # before the teacher is frozen
        objective = GeneralDistillation(settings.objective, tokenizer, recipe.seed, teacher)
    else:
        objective = objectives.build(
            settings.objective,
            tokenizer,
            recipe.seed,
            model=model.config,
            steps=settings.steps,
            group_size=plan.group_size,
            memory_module=recipe.model.memory_module,
            **together,
        )
    masks = None
    if settings.sparsity:
        prunable = Prunable.of(model.config)
        (goal,) = goals.goals(settings.sparsity, prunable)
        if "hidden" in settings.sparsity.units:
            surgery.check_dimensions(model.config)
        masks = Masks(prunable, settings.sparsity, target=goal.share, steps=settings.steps, seed=recipe.seed, head_share=goal.head_share)
        objective = Upstream(objective, masks)
    if rare is not None:
        assert settings.notes is not None
        objective.take_notes(Notes(settings.notes, len(rare), model.config.hidden_size, recipe.seed))
    flops = None
    if isinstance(model.config, TrimlineConfig):
        flops = size.training_flops_per_row(model.config, plan.length, objective.predicted) + objective.training_flops_per_row(plan.length)
    parameters = size.parameters(model)

    trainee = Trainee(model, objective, side=objective.notes or masks, flops_per_row=flops)
    summary = train(
        trainee,
        batches,
        settings,
        steps=settings.steps,
        seed=recipe.seed,
        directory=work.scratch,
        logs=work.logs,
        ranks=work.ranks,
        loss_weights={**objective.loss_weights, **settings.loss_weights},
    )
    pruned: dict[str, Any] = {}
    if work.ranks.first and masks is None:
        export.save(model, tokenizer, work.directory / "model", summary.weights)
    elif work.ranks.first:
        assert masks is not None
        export.save(model, tokenizer, work.scratch / "whole", summary.weights)
        pruned = _remove(work, build.load(work.scratch / "whole", head=settings.objective.head), masks, goal, tokenizer)
    losses = {name if name in trainee.figures else f"loss_{name}": round(loss, 4) for name, loss in summary.losses.items()}
    ratios = {name: round(ratio, 4) for name, ratio in summary.ratios.items()}
    return {
        **losses,
        **ratios,
        "steps": summary.steps,
        "tokens_per_second": round(summary.tokens_per_second),
        "parameters": parameters,
        **pruned,
    }


def _remove(work: Work, whole: Any, masks: Masks, goal: goals.Goal, tokenizer: Any) -> dict[str, Any]:
    """Publishes what the masks leave of the trained model, and says how much they removed."""
    settled, _ = goals.settle(masks, goal, 1)
    removed = surgery.remove(whole, settled)
    left = structure(settled, masks.prunable)
    Console().print(table(left))
    artifacts.write_json(work.directory / "structure.json", left)
    export.save(surgery.compact(removed) if goal.shape else removed, tokenizer, work.directory / "model")
    realised = 1 - size.block_parameters(removed.config) / size.block_parameters(whole.config)
    return {
        "expected_sparsity": round(masks.expected_sparsity().item(), 4),
        "realised_sparsity": round(realised, 4),
        "parameters": size.parameters(removed),
    }


def starting_model(recipe: Recipe, tokenizer: Any, length: int) -> Any:
    """New weights, or those of `model.from`, under the head that the objective needs."""
    assert recipe.pretrain is not None
    if recipe.model.from_ is None:
        return build.new(recipe.model, tokenizer, recipe.pretrain.objective.head)
    model = build.load(recipe.model.from_, head=recipe.pretrain.objective.head, trust_remote_code=recipe.model.trust_remote_code)
    build.adopt(model, recipe.model)
    build.check_fits(model, tokenizer, length, recipe.pretrain.document_mask)
    if recipe.pretrain.notes and not isinstance(model, TrimlinePreTrainedModel):
        raise UserError(
            f"{recipe.model.from_}: pretrain.notes are mixed into the input of Trimline's own models, BERT's and RoBERTa's, "
            f"not of one of type {model.config.model_type!r}; leave notes out, or start from one of those"
        )
    objective = recipe.pretrain.objective
    if (isinstance(objective, DistillSettings) or recipe.pretrain.sparsity) and not isinstance(model, TrimlinePreTrainedModel):
        why = stock.unlike(model.config)
        raise UserError(f"{recipe.model.from_}: cannot be pruned or distilled: {why}; start from one of Trimline's own models, a BERT or a RoBERTa")
    if isinstance(objective, TrimeSettings) or (isinstance(objective, CausalSettings) and objective.chunk):
        CausalReader(model, recipe.model.memory_module).check()
    return model
