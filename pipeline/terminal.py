"""What `run`, `plan` and `status` print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import workflow
from pipeline.recipe import Recipe, TaskTrainSettings
from pipeline.training.settings import TrainSettings
from pipeline.workflow import Step

FIGURES = 5
"""Headline figures shown of a stage; its manifest has all."""

console = Console(highlight=False, soft_wrap=True)


def opening(recipe: Recipe, steps: Sequence[Step]) -> None:
    todo = [step.stage for step in steps if step.artifact is None]
    console.print(f"[bold]{recipe.name}[/]: {' -> '.join(recipe.stages)}  in {recipe.directory}")
    console.print(f"to do: {', '.join(todo)}" if todo else "everything is up to date")


def stage(step: Step) -> None:
    console.print(f"\n[bold]{step.stage}[/] {step.fingerprint[:8]}: {step.why}")


def closing(recipe: Recipe, steps: Sequence[Step]) -> None:
    """The table of what was made, the report's own tables, and where to look."""
    table = _table("stage", "made", "seconds", "headline")
    for step in steps:
        if step.artifact is not None:
            manifest = step.artifact.manifest
            table.add_row(step.stage, step.name, f"{manifest['seconds']:.0f}", headline(step.artifact.metrics))
    console.print()
    console.print(table)
    evaluated = next((step.artifact for step in steps if step.stage == "evaluate" and step.artifact), None)
    if evaluated is not None:
        from pipeline.evaluation import report

        console.print(report.table(json.loads((evaluated.path / "report.json").read_text())))
        console.print(f"Report:  {evaluated.path / 'report.md'}")
    console.print(f"Curves:  tensorboard --logdir {recipe.directory / 'logs'}")


def plan(recipe: Recipe, steps: Sequence[Step]) -> None:
    table = _table("stage", "fingerprint", "state")
    for step in steps:
        table.add_row(step.stage, step.fingerprint[:8], step.why)
    console.print(table)
    derived = _table("derived", "", "")
    packed = next((step.artifact for step in steps if step.stage == "pack" and step.artifact), None)
    for name in ("pretrain", "finetune", "prune"):
        settings = getattr(recipe, name)
        if settings is None:
            continue
        derived.add_row(name, "one step", _division(recipe, name, settings))
        if name == "pretrain":
            derived.add_row("", "whole run", _pretraining(recipe, packed.metrics if packed else None))
        elif isinstance(settings, TaskTrainSettings):
            derived.add_row("", "whole run", f"{settings.epochs:g} epochs of the task's training split")
        if name == "prune":
            derived.add_row("", "recovery step", _division(recipe, name, settings.recovery))
    if derived.row_count:
        console.print(derived)


def _division(recipe: Recipe, stage: str, training: TrainSettings) -> str:
    """How a global batch is divided on the recipe's local ranks; also checks the DeepSpeed configuration."""
    ranks = getattr(recipe, stage).ranks
    rows, accumulation = workflow.division(recipe, stage, training, ranks)
    return f"{training.batch_size} rows = {ranks} ranks x {rows} rows x {accumulation} accumulated, {training.deepspeed}"


def _pretraining(recipe: Recipe, packed: dict[str, Any] | None) -> str:
    assert recipe.pretrain is not None
    assert recipe.pack is not None
    tokens = recipe.pretrain.steps * recipe.pretrain.batch_size * recipe.pack.length
    text = f"{recipe.pretrain.steps} steps, {tokens / 1e6:.1f} M tokens"
    if packed is None:
        return f"{text}; steps an epoch are known once pack is made"
    an_epoch = packed["groups"] * recipe.pack.group_size / recipe.pretrain.batch_size
    return f"{text}, {recipe.pretrain.steps / an_epoch:.2f} epochs of {an_epoch:.1f} steps"


def status(rows: Sequence[Sequence[str]]) -> None:
    table = _table("stage", "state", "when", "headline")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def headline(metrics: dict[str, Any]) -> str:
    """The first few headline figures in one line: `loss 3.21, tokens per second 41,200`."""
    figures = [f"{name.replace('_', ' ')} {_figure(value)}" for name, value in metrics.items() if isinstance(value, int | float | str)]
    return ", ".join(figures[:FIGURES])


def _figure(value: float | str) -> str:
    if isinstance(value, str | bool):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
