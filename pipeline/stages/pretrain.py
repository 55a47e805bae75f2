"""Plan and token store -> a pretrained model."""

from __future__ import annotations

from typing import Any

import torch

from pipeline import objectives
from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.store import Store
from pipeline.errors import UserError
from pipeline.models import build, export, size
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlinePreTrainedModel
from pipeline.objectives.base import Trainee
from pipeline.objectives.notes import Notes
from pipeline.objectives.settings import CausalSettings, TrimeSettings
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
    if rare is not None:
        assert settings.notes is not None
        objective.take_notes(Notes(settings.notes, len(rare), model.config.hidden_size, recipe.seed))
    flops = None
    if isinstance(model.config, TrimlineConfig):
        flops = size.training_flops_per_row(model.config, plan.length, objective.predicted) + objective.training_flops_per_row(plan.length)
    parameters = size.parameters(model)

    trainee = Trainee(model, objective, side=objective.notes, flops_per_row=flops)
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
    if work.ranks.first:
        export.save(model, tokenizer, work.directory / "model", summary.weights)
    losses = {name if name in trainee.figures else f"loss_{name}": round(loss, 4) for name, loss in summary.losses.items()}
    ratios = {name: round(ratio, 4) for name, ratio in summary.ratios.items()}
    return {**losses, **ratios, "steps": summary.steps, "tokens_per_second": round(summary.tokens_per_second), "parameters": parameters}


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
            f"{recipe.model.from_}: pretrain.notes are mixed into the input of Trimline's own models and of BERT, "
            f"not of one of type {model.config.model_type!r}; leave notes out, or start from one of those"
        )
    objective = recipe.pretrain.objective
    if isinstance(objective, TrimeSettings) or (isinstance(objective, CausalSettings) and objective.chunk):
        CausalReader(model, recipe.model.memory_module).check()
    return model
