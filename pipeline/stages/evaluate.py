"""Every model the recipe made -> a report: how well each does, how large and how fast it is."""

from __future__ import annotations

import json
from typing import Any

import torch

from pipeline import objectives
from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.store import Store
from pipeline.evaluation import perplexity, speed
from pipeline.evaluation import report as reports
from pipeline.models import build, size
from pipeline.models.modeling_trimline import TrimlineConfig
from pipeline.packing.loader import Loader
from pipeline.packing.plan import Plan
from pipeline.tasks import metrics
from pipeline.tasks.task import Task
from pipeline.workflow import Work

FINETUNED, PRUNED = "fine-tuned", "pruned"


def run(work: Work) -> dict[str, Any]:
    if not work.ranks.first:  # one process measures
        return {}
    settings = work.recipe.evaluate
    assert settings is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: reports.Report = {"name": work.recipe.name, "stages": _stages(work), "held_out": None, "task": None, "models": {}, "latency": None}
    if work.recipe.pretrain:
        print("evaluate: the pretrained model on held-out text", flush=True)
        report["held_out"] = _held_out(work, report, device)
    if work.recipe.finetune:
        models = {FINETUNED: _load(work, "finetune")}
        if work.recipe.prune:
            models[PRUNED] = _load(work, "prune")
        report["models"] |= {name: _counts(model) for name, model in models.items()}
        tokenizer = tokenizers.load(work.input("finetune") / "model")
        task = Task.open(work.input("finetune") / "task.json")
        print(f"evaluate: {' and '.join(models)} model on the task", flush=True)
        scores = {name: metrics.evaluate(model, tokenizer, task, "test", settings.batch_size, device) for name, model in models.items()}
        report["task"] = {"split": "test", "metric": task.metric, "scores": scores}
        print("evaluate: speed", flush=True)
        report["latency"] = speed.latency(models, settings.latency, len(tokenizer), device)
    report |= {"device": speed.device_name(device), "versions": next(reversed(work.inputs.values())).manifest["versions"]}
    reports.write(report, work.directory)
    return reports.headline(report)


def _held_out(work: Work, report: reports.Report, device: torch.device) -> dict[str, Any] | None:
    """The pretrained model's loss on the validation split; None where nothing was held out."""
    recipe, settings = work.recipe, work.recipe.evaluate
    assert recipe.pretrain is not None
    assert settings is not None
    head: build.Head = "mlm" if recipe.pretrain.objective.kind == "encoder" else "causal"
    model = build.load(work.input("pretrain") / "model", head=head, trust_remote_code=recipe.model.trust_remote_code)
    report["models"]["pretrained"] = _counts(model)
    plan = Plan.open(work.input("pack") / "valid")
    if not len(plan.groups):
        return None
    tokenizer, store = tokenizers.load(work.input("tokenize") / "tokenizer"), Store.open(work.input("tokenize") / "valid")
    objective = objectives.build(recipe.pretrain.objective, tokenizer, recipe.seed)
    loader = Loader(plan, store, tokenizer, plan.group_size, recipe.seed, document_mask=recipe.pretrain.document_mask)
    found = perplexity.score(model, objective, loader, batch_size=settings.batch_size, max_segments=settings.max_segments, device=device)
    bits = None
    if recipe.pretrain.objective.kind == "decoder":
        text_bytes = json.loads((work.input("tokenize") / "corpus.json").read_text())["valid_bytes"]
        bits = found.bits_per_byte(int(store.lengths.sum()), text_bytes)
    return {
        "objective": recipe.pretrain.objective.name,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": bits,
        "targets": found.targets,
        "segments": found.segments,
        "of_segments": found.of_segments,
    }


def _load(work: Work, stage: str) -> Any:
    return build.load(work.input(stage) / "model", head="classification", trust_remote_code=work.recipe.model.trust_remote_code)


def _counts(model: Any) -> dict[str, int | None]:
    return {
        "parameters": size.parameters(model),
        "encoder_parameters": size.block_parameters(model.config) if isinstance(model.config, TrimlineConfig) else None,
    }


def _stages(work: Work) -> list[dict[str, Any]]:
    return [{"stage": stage, "seconds": made.manifest["seconds"], "metrics": made.metrics} for stage, made in work.inputs.items()]
