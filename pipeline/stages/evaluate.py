"""Every model the recipe made -> a report: how well each does, how large and how fast it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pipeline import objectives
from pipeline.compression.pictures import Point, trade_off_figure
from pipeline.corpus import tokenizer as tokenizers
from pipeline.corpus.store import Store
from pipeline.evaluation import memories, perplexity, speed
from pipeline.evaluation import report as reports
from pipeline.memory.external import External
from pipeline.models import build, identity, size
from pipeline.models.causal_reader import CausalReader
from pipeline.models.modeling_trimline import TrimlineConfig
from pipeline.objectives.settings import CausalSettings, ReplacedTokenSettings
from pipeline.packing.loader import Loader
from pipeline.packing.plan import Plan, tokenizer_identity
from pipeline.recipe import PretrainSettings
from pipeline.tasks import metrics
from pipeline.tasks import task as tasks
from pipeline.workflow import Work

FINETUNED, PRUNED = "fine-tuned", "pruned"


def run(work: Work) -> dict[str, Any]:
    if not work.ranks.first:  # one process measures
        return {}
    recipe, settings = work.recipe, work.recipe.evaluate
    assert settings is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report: reports.Report = {
        "name": recipe.name,
        "stages": _stages(work),
        "held_out": None,
        "memories": None,
        "task": None,
        "models": {},
        "latency": None,
    }
    if recipe.pretrain or settings.memory:
        model = _pretrained(work)
        report["models"]["pretrained"] = _counts(model)
        if recipe.pretrain:
            print("evaluate: the pretrained model on held-out text", flush=True)
            report["held_out"] = _held_out(work, recipe.pretrain, model, device)
        if settings.memory:
            print(f"evaluate: the pretrained model with {', '.join(settings.memory)}", flush=True)
            report["memories"] = _memories(work, model, device)
    if recipe.finetune:
        task = tasks.open(work.input("finetune") / "task.json")
        models = {FINETUNED: _load(work.input("finetune") / "model", work, task.head)}
        if recipe.prune:
            models |= {name: _load(directory, work, task.head) for name, directory in _pruned(work.input("prune")).items()}
        report["models"] |= {name: _counts(model) for name, model in models.items()}
        tokenizer = tokenizers.load(work.input("finetune") / "model")
        print(f"evaluate: {' and '.join(models)} model on the task", flush=True)
        scores = {name: metrics.evaluate(model, tokenizer, task, "test", settings.batch_size, device) for name, model in models.items()}
        report["task"] = {"split": "test", "metric": task.metric, "scores": scores}
        print("evaluate: speed", flush=True)
        report["latency"] = latency = speed.latency(models, settings.latency, len(tokenizer), device)
        if recipe.prune:
            points = [
                Point(recipe.prune.method, name.removeprefix(PRUNED).strip(), latency["speed_up"][name], scores[name][task.metric])
                for name in models
                if name != FINETUNED
            ]
            figure = trade_off_figure(points, metric=f"{task.metric} ({report['task']['split']})", teacher=scores[FINETUNED][task.metric])
            figure.savefig(work.directory / "trade_off.png")
    report |= {"device": speed.device_name(device), "versions": next(reversed(work.inputs.values())).manifest["versions"]}
    reports.write(report, work.directory)
    return reports.headline(report)


def _pretrained(work: Work) -> Any:
    pretrain = work.recipe.pretrain
    head = pretrain.objective.head if pretrain else "causal"
    return build.load(_model_directory(work), head=head, trust_remote_code=work.recipe.model.trust_remote_code)


def _model_directory(work: Work) -> Path:
    """What pretrain made, or the model that stands in for it."""
    return work.input("pretrain") / "model" if work.recipe.pretrain else Path(work.recipe.model.from_ or "")


def _held_out(work: Work, pretrain: PretrainSettings, model: Any, device: torch.device) -> dict[str, Any] | None:
    """The pretrained model's loss on the validation split, a decoder's without any memory.

    None where nothing was held out, and for a model that learned to tell replaced tokens: its generator, which could predict them, is gone.
    """
    if isinstance(pretrain.objective, ReplacedTokenSettings):
        return None
    recipe, settings = work.recipe, work.recipe.evaluate
    assert settings is not None
    plan = Plan.open(work.input("pack") / "valid")
    if not len(plan.groups):
        return None
    tokenizer, store = tokenizers.load(work.input("tokenize") / "tokenizer"), Store.open(work.input("tokenize") / "valid")
    of_what = pretrain.objective if pretrain.objective.kind == "encoder" else CausalSettings()
    objective = objectives.build(of_what, tokenizer, recipe.seed)
    loader = Loader(plan, store, tokenizer, plan.group_size, recipe.seed, document_mask=pretrain.document_mask, words=of_what.needs_words)
    found = perplexity.score(model, objective, loader, batch_size=settings.batch_size, max_segments=settings.max_segments, device=device)
    bits = None
    if of_what.kind == "decoder":
        text_bytes = json.loads((work.input("tokenize") / "corpus.json").read_text())["valid_bytes"]
        bits = found.bits_per_byte(int(store.lengths.sum()), text_bytes)
    return {
        "objective": pretrain.objective.name,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": bits,
        "targets": found.targets,
        "segments": found.segments,
        "of_segments": found.of_segments,
    }


def _memories(work: Work, model: Any, device: torch.device) -> dict[str, Any]:
    """The pretrained model on held-out documents with each memory that is asked for."""
    recipe, settings = work.recipe, work.recipe.evaluate
    assert settings is not None
    tokenizer, directory = tokenizers.load(work.input("tokenize") / "tokenizer"), _model_directory(work)
    length = sum(settings.windowed(recipe.row_length))
    build.check_fits(model, tokenizer, length)
    reader = CausalReader(model, recipe.model.memory_module)
    reader.check()
    external = None
    if settings.searches:
        place = settings.datastore or work.input("index") / "datastore"
        external = External.open(place, directory, tokenizer_identity(tokenizer), trust_remote_code=recipe.model.trust_remote_code)
        external.check_fits(tokenizer, length)
        external.store.probe = settings.external.probe
    tested = memories.evaluate(
        reader,
        Store.open(work.input("tokenize") / "valid"),
        tokenizer,
        settings,
        row_length=recipe.row_length,
        within_documents=recipe.pack is None or recipe.pack.segments != "across",
        store=external.store if external else None,
        encoder=external.encoder if external else None,
        device=device,
        scratch=work.scratch / "memories",
        identity=f"{identity.fingerprint(directory)} {recipe.model.memory_module} {external and external.identity}",
    )
    return tested.report()


def _pruned(made: Path) -> dict[str, Path]:
    """The pruned model; of several targets one a target, from the least pruned."""
    names = [entry["name"] for entry in json.loads((made / "structure.json").read_text())] if (made / "models").is_dir() else []
    return {f"{PRUNED} {name}": made / "models" / name for name in names} or {PRUNED: made / "model"}


def _load(directory: Path, work: Work, head: build.Head) -> Any:
    return build.load(directory, head=head, trust_remote_code=work.recipe.model.trust_remote_code)


def _counts(model: Any) -> dict[str, int | None]:
    return {
        "parameters": size.parameters(model),
        "encoder_parameters": size.block_parameters(model.config) if isinstance(model.config, TrimlineConfig) else None,
    }


def _stages(work: Work) -> list[dict[str, Any]]:
    return [{"stage": stage, "seconds": made.manifest["seconds"], "metrics": made.metrics} for stage, made in work.inputs.items()]
