"""What `run`, `plan`, `status` and `inspect` print."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipeline import workflow
from pipeline.recipe import Recipe, TaskTrainSettings
from pipeline.training.settings import TrainSettings
from pipeline.workflow import Step

if TYPE_CHECKING:
    from pipeline.memory.documents import Entry
    from pipeline.packing.quality import Member, Quality

FIGURES = 5
"""Headline figures shown of a stage; its manifest has all."""

DOCUMENTS = 50
"""Documents of a datastore listed at most."""

MEASURES = (
    ("bm25", "BM25 inside groups", ".1f"),
    ("positives", "positives: targets another segment has", ".1%"),
    ("rare_positives", "positives of rare tokens (in 2% of segments)", ".1%"),
    ("same_document", "pairs from one document", ".1%"),
)
"""What is compared with a random plan."""

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
    if recipe.pretrain.time_budget is not None:
        text = f"{recipe.pretrain.time_budget:g} minutes, at most {text}"
    if packed is None:
        return f"{text}; steps an epoch are known once pack is made"
    an_epoch = packed["groups"] * recipe.pack.group_size / recipe.pretrain.batch_size
    return f"{text}, {recipe.pretrain.steps / an_epoch:.2f} epochs of {an_epoch:.1f} steps"


def status(rows: Sequence[Sequence[str]]) -> None:
    table = _table("stage", "state", "when", "headline")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def quality(found: Quality) -> None:
    """The figures of a plan beside those of a random one, and the groups to read."""
    plan, counts = found.plan, found.counts
    console.print(f"[bold]{plan.directory}[/]: {plan.kind} rows of {plan.length} tokens, segments {plan.settings.segments}")
    console.print(f"groups {plan.settings.groups}, {plan.group_size} segments in each" if plan.group_size > 1 else "groups of one segment")
    table = _table("", "plan", *(["random"] if found.in_group else []))
    table.columns[1].justify = "right"
    for name in ("segments", "groups", "short_groups", "tokens", "dropped_tokens", "padded_tokens"):
        table.add_row(name.replace("_", " "), f"{counts[name]:,}")
    table.add_row("fill rate", f"{counts['fill_rate']:.1%}")
    for name, count in counts.get("duplicates", {}).items():
        table.add_row(f"near-duplicates {name}", f"{count:,}")
    if "met_but_should_not" in counts:
        table.add_row("pairs that had to meet", f"{counts['met_but_should_not']:,}")
    if found.in_group and found.random:
        table.columns[2].justify = "right"
        for name, label, style in MEASURES:
            one, other = (getattr(side, name) for side in (found.in_group, found.random))
            table.add_row(label, *("-" if value is None else format(value, style) for value in (one, other)))
    console.print(table)
    if found.in_group:
        share = f"{found.measured:,} of {counts['groups']:,} groups (seed {found.seed})" if found.measured < counts["groups"] else "all groups"
        counted = f"{found.counted:,} of {counts['segments']:,}" if found.counted < counts["segments"] else "all"
        console.print(f"[dim]Inside groups: {share}; BM25 of {plan.settings.bm25.terms}; frequencies over {counted} segments.[/]")
    for number, members in found.read:
        console.print(f"\n[bold]Group {number:,}[/]" if found.in_group else "")
        for member in members:
            _member(member)


def _member(member: Member) -> None:
    documents = f"document{'s' if len(member.documents) > 1 else ''} {', '.join(f'{number:,}' for number in member.documents[:4])}"
    similarity = "" if member.similarity is None else f", similarity {member.similarity:.1f}"
    console.print(f"[bold]segment {member.segment:,}[/], {documents}{', ...' if len(member.documents) > 4 else ''}{similarity}")
    text = Text(member.text)
    if member.shared:
        text.highlight_regex(rf"(?i)(?<!\w)({'|'.join(map(re.escape, member.shared))})(?!\w)", "bold cyan")
    console.print(Padding(text, (0, 0, 0, 4), expand=False), soft_wrap=False)
    if member.shared:
        console.print(Padding(Text(f"shares: {', '.join(member.shared)}", "cyan"), (0, 0, 0, 4), expand=False), soft_wrap=False)


def datastore(place: Path, about: dict[str, Any]) -> None:
    """What a datastore is, in two columns."""
    size, gone = sum(entry["bytes"] for entry in about["files"].values()), sum(about["shards"]) - about["entries"]
    model, window = about["model"], about["window"]
    keys = "fp16, kept" if about["keep_keys"] else "dropped, their codes kept"
    table = _table("datastore", str(place))
    table.add_row("documents", f"{about['documents']:,}")
    table.add_row("entries", f"{about['entries']:,}{f', and the gaps of {gone:,} that were withdrawn' if gone else ''}")
    table.add_row("keys", f"{about['key']}, {about['dimensions']} dimensions; {keys}")
    table.add_row("search", f"{about['kind']}, {about['metric']}, {len(about['shards'])} shards")
    table.add_row("size", f"{size / 1e6:,.1f} MB, {size / max(about['entries'], 1):,.0f} bytes an entry")
    table.add_row("window", f"{window['block']} tokens after {window['context']} read again")
    table.add_row("encoder" if model["encoder"] else "model", f"{model['path']} ({model['fingerprint'][:8]})")
    table.add_row("revision", about["revision"][:8])
    console.print(table)


def documents(found: Sequence[Entry], what: str) -> None:
    """Documents of a datastore, a line each."""
    console.print(f"{len(found):,} document{'' if len(found) == 1 else 's'} {what}")
    table = _table("number", "entries", "from", "begins")
    for entry in found[:DOCUMENTS]:
        table.add_row(str(entry.number), f"{entry.count:,}", Text(entry.key), Text(entry.preview))
    if found:
        console.print(table)
    if len(found) > DOCUMENTS:
        console.print(f"and {len(found) - DOCUMENTS:,} more")


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
