"""What `acceleration.py` measures of an arm: held-out loss, probes of the frozen encoder, fine-tuned tasks, and the time of a training step."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from acceleration_arms import Arm
from acceleration_data import spaced
from torch import nn

from pipeline import recipe as recipes
from pipeline import workflow
from pipeline.evaluation import perplexity
from pipeline.launch.ranks import Ranks
from pipeline.models import build
from pipeline.models.stopwatch import milliseconds
from pipeline.objectives.mlm import Mlm
from pipeline.objectives.notes import Notes
from pipeline.objectives.settings import MlmSettings
from pipeline.packing import word_counts
from pipeline.packing.loader import Loader
from pipeline.stages import pretrain as pretrain_stage
from pipeline.tasks import glue, tables
from pipeline.tasks.settings import GlueName
from pipeline.workflow import Work

ROWS = 1280
"""Held-out rows that a loss is the mean of."""
MASKED = MlmSettings(mask_token_rate=1.0, random_token_rate=0.0)
REPLACED = MlmSettings(mask_token_rate=0.0, random_token_rate=1.0)
PROBES = {"mask": MASKED, "words": REPLACED}
PROBE_STEPS, PROBE_LR = 100, 1e-2
TASKS: tuple[GlueName, ...] = ("SST-2", "CoLA", "STS-B", "RTE")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kept(arm: Arm, what: str, measure: Callable[[], Any]) -> Any:
    """A measurement of an arm, made once."""
    path = arm.recipe.directory / "measured" / arm.identity / f"{what}.json"
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".partial").write_text(json.dumps(found))
        path.with_suffix(".partial").rename(path)
    return json.loads(path.read_text())


# -- quality -----------------------------------------------------------------------------------------------------------


def value(arm: Arm, step: int, notes: bool = False) -> float:
    """Loss of the masked-language-model head on held-out rows, every target replaced by the mask token; with the notes taken until then, if asked."""
    what = f"value{'-notes' if notes else ''}-{step}"
    return kept(arm, what, lambda: _loss(arm, build.load(arm.snapshot(step), head="mlm"), MASKED, _notes(arm, step) if notes else None))


def _notes(arm: Arm, step: int) -> Notes:
    state = torch.load(arm.snapshot(step) / "side.pt", weights_only=True)
    settings = arm.recipe.pretrain.notes  # type: ignore[union-attr]
    assert settings is not None
    words, width = state["table"].shape
    notes = Notes(settings, words, width, seed=0)
    notes.load_state_dict(state)
    return notes.to(device()).eval()


def probe(arm: Arm, step: int, shown: str) -> float:
    """Held-out loss of a new head on the frozen encoder, targets replaced by the mask token or by random words (`shown`: mask, words).

    The head's output matrix is the arm's token table, frozen too; its bias starts as the logarithm of the tokens' frequencies.
    """
    return kept(arm, f"probe-{shown}-{step}", lambda: _probe(arm, step, PROBES[shown]))


def _probe(arm: Arm, step: int, settings: MlmSettings) -> float:
    model: Any = build.load(arm.snapshot(step), head="mlm")
    model.to(device()).train()
    model.requires_grad_(False)
    torch.manual_seed(0)
    with torch.no_grad():
        nn.init.normal_(model.head.dense.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.head.dense.bias)
        model.head.norm.reset_parameters()
        model.head.decoder.bias.copy_(torch.from_numpy(arm.unigram).log())
    trained = [*model.head.dense.parameters(), *model.head.norm.parameters(), model.head.decoder.bias]
    for parameter in trained:
        parameter.requires_grad_()
    objective = Mlm(settings, arm.tokenizer, seed=0)
    batches = Loader(arm.plan("train"), arm.store("train"), arm.tokenizer, 64, seed=0)
    optimizer = torch.optim.AdamW(trained, lr=PROBE_LR, betas=(0.9, 0.98))
    for number in range(PROBE_STEPS):
        optimizer.param_groups[0]["lr"] = PROBE_LR * (1 - number / PROBE_STEPS)
        rows = {name: torch.from_numpy(array).to(device()) for name, array in batches.batch(number).items()}
        (loss,) = objective(model, objective.prepare(rows, number), number).values()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return _loss(arm, model, settings)


def _loss(arm: Arm, model: Any, settings: MlmSettings, notes: Notes | None = None) -> float:
    objective, rare = Mlm(settings, arm.tokenizer, seed=0), None
    if notes is not None:
        objective.take_notes(notes)
        rare = word_counts.rare(notes.settings.frequency, arm.store("train"), arm.tokenizer, Ranks(), arm.snapshot(0).parent)
    rows = Loader(arm.plan("valid"), arm.store("valid"), arm.tokenizer, 1, seed=0, rare=rare)
    return perplexity.score(model, objective, rows, batch_size=64, max_segments=ROWS, device=device()).loss


def finetuned(arm: Arm, step: int, task: GlueName, seed: int) -> float:
    """The task's headline score on its development split, in percent, by the finetune stage."""
    return kept(arm, f"{task}-{step}-{seed}", lambda: _finetuned(arm, step, task, seed))


def _finetuned(arm: Arm, step: int, task: GlueName, seed: int) -> float:
    metric = glue.TASKS[task].metrics[0]
    settings = {"metric": metric, "max_length": arm.size.length, "max_train": arm.size.finetuning_examples, **table(arm, task)}
    recipe = recipes.Recipe.model_validate(
        {
            "name": f"{arm.size.name}-tasks",
            "runs_dir": str(arm.work / "runs"),
            "seed": seed,
            "model": {"from": str(arm.snapshot(step))},
            "finetune": {"task": settings, "warmup_ratio": 0.06, "deepspeed": arm.size.deepspeed, "log_every": 1000, **arm.size.finetuning},
        }
    )
    workflow.execute(recipe, "finetune", Ranks())
    made = arm.artifact("finetune", recipe)
    shutil.rmtree(made.path)  # there will be hundreds
    return 100 * made.metrics[f"dev_{metric}"]


def table(arm: Arm, task: GlueName) -> dict[str, Any]:
    """A recipe's settings of the task, its tables rewritten as the pretraining text was: made once."""
    layout, files = glue.find(task, arm.data / "glue" / task)
    written: dict[str, Any] = {"kind": "classification" if glue.TASKS[task].labels else "regression", "dev_fraction": 0.2}
    for split in ("train", "dev"):
        if split not in files:
            continue
        path = arm.work / "tasks" / task / f"{split}.jsonl"
        if not path.exists():
            lines = [
                {"text": spaced(record.text), "label": record.label} | ({"pair": spaced(record.text_pair)} if record.text_pair else {})
                for record in tables.read(files[split], layout.columns(task))
            ]
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            partial.rename(path)
        written[split] = str(path)
    return written | ({} if layout.text_pair is None else {"text_pair": "pair"})


# -- cost --------------------------------------------------------------------------------------------------------------


class _Caught(Exception):
    """What the pretrain stage was about to train."""


def caught(arm: Arm) -> dict[str, Any]:
    """`trainee`, `batches` and `weights` of the losses, as the pretrain stage makes them."""
    found: dict[str, Any] = {}

    def train(trainee: Any, batches: Any, *_: Any, loss_weights: dict[str, float] | None = None, **__: Any) -> None:
        found.update(trainee=trainee, batches=batches, weights=loss_weights or {})
        raise _Caught

    inputs = {stage: arm.artifact(stage) for stage in ("tokenize", "pack")}
    with tempfile.TemporaryDirectory() as place, mock.patch.object(pretrain_stage, "train", train):
        try:
            pretrain_stage.run(Work("pretrain", arm.recipe, inputs, Path(place), Path(place)))
        except _Caught:
            return found
    raise AssertionError("the pretrain stage did not train")


def step_times(arms: list[Arm], repeats: int) -> dict[str, float]:
    """Milliseconds of a training step of each arm, the median: plain PyTorch, the arms in turn; CPU time of one thread, or the clock on a GPU."""
    times, _ = milliseconds({arm.name: _step(arm) for arm in arms}, repeats, device(), threads=1, clock=time.process_time)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _step(arm: Arm) -> Callable[[], None]:
    made = caught(arm)
    trainee, batches = made["trainee"].to(device()).train(), made["batches"]
    side = trainee.side
    if side is not None:
        side.to(device())
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-5)
    narrow = torch.autocast(device().type, torch.bfloat16, enabled="bf16" in arm.size.deepspeed)

    steps = itertools.count()

    def step() -> None:
        number = next(steps)
        if side is not None:
            side.before_step(number)
        rows = {name: torch.from_numpy(array).to(device()) for name, array in batches.batch(number, 0, 1).items()}
        batch = trainee.prepare(rows, number)
        with narrow:
            losses = trainee(batch, number)
        sum(made["weights"].get(name, 1.0) * loss for name, loss in losses.items() if name not in trainee.figures).backward()
        if side is not None:
            side.after_step(number)
        optimizer.step()
        trainee.zero_grad()

    return step
