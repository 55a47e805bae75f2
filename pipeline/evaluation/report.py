"""What a run made: JSON for programs, Markdown to keep, the results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from pipeline import artifacts

Report = dict[str, Any]
"""name; stages: list of {stage, seconds, metrics}; versions; device; and, where the recipe made such models,
held_out: {objective, loss, perplexity, bits_per_byte or None, targets, segments, of_segments};
memories: as `memories.Tested.report` gives it;
task: {split, metric, scores: {model: {metric: value}}}; models: {model: {parameters, encoder_parameters or None}};
latency: as `speed.latency` gives it. What is missing is None or empty."""

Rows = Sequence[Sequence[str]]


def write(report: Report, directory: Path) -> None:
    """`report.json` and `report.md`."""
    artifacts.write_json(directory / "report.json", report)
    (directory / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: Report) -> str:
    notes = "\n".join(f"- {note}" for note in _notes(report))
    memories = ["## Memories", _markdown_table(_memory_rows(report))] if report.get("memories") else []
    results = ["## Results", _markdown_table(_result_rows(report)), *memories, notes]
    parts = [f"# {report['name']}", "## Stages", _markdown_table(_stage_rows(report)), *results]
    return "\n\n".join(parts) + "\n"


def table(report: Report) -> Group:
    """The results for the terminal, for rich to print."""
    shown = [_terminal_table("Results", _result_rows(report))]
    if report.get("memories"):
        *figures, values = zip(*_memory_rows(report), strict=True)
        shown.append(_terminal_table("Memories", list(zip(*figures, strict=True))))
        shown.append(_terminal_table("", [row for row in zip(figures[0], values, strict=True) if row[1]]))
    return Group(*shown, *_notes(report))


def _terminal_table(title: str, rows: Rows) -> Table:
    head, *body = rows
    shown = Table(title=title or None, title_justify="left")
    for name in head:
        shown.add_column(name, overflow="fold")
    for row in body:
        shown.add_row(*row)
    return shown


def headline(report: Report) -> dict[str, Any]:
    """What the manifest of the stage says."""
    held_out, task, latency = report["held_out"], report["task"], report["latency"]
    figures: dict[str, Any] = {}
    if held_out:
        figures["mlm_perplexity" if held_out["objective"] == "mlm" else "perplexity"] = round(held_out["perplexity"], 3)
        if held_out["bits_per_byte"] is not None:
            figures["bits_per_byte"] = round(held_out["bits_per_byte"], 4)
    if report.get("memories"):
        figures |= {f"perplexity_{_key(row['memory'])}": round(row["perplexity"], 3) for row in report["memories"]["rows"]}
    if task:
        figures |= {f"{task['split']}_{task['metric']}_{_key(model)}": round(scores[task["metric"]], 4) for model, scores in task["scores"].items()}
    pruned = {model: times for model, times in latency["speed_up"].items() if model.startswith("pruned")} if latency else {}
    figures |= {_key(model.replace("pruned", "speed_up")): round(times, 2) for model, times in pruned.items()}
    return figures


def _key(name: str) -> str:
    return name.replace("-", "").replace(", ", "_").replace(" ", "_").replace("+", "_")


def _stage_rows(report: Report) -> Rows:
    rows = [[stage["stage"], _duration(stage["seconds"]), _metrics(stage["metrics"])] for stage in report["stages"]]
    return [["stage", "time", "headline"], *rows]


def _result_rows(report: Report) -> Rows:
    """One column a model."""
    models = report["models"]
    rows = [["", *models]]
    held_out, task, latency = report["held_out"], report["task"], report["latency"]
    if held_out:
        name = "perplexity of masked tokens" if held_out["objective"] == "mlm" else "perplexity"
        rows.append(_row(name, models, {"pretrained": f"{held_out['perplexity']:.2f}"}))
        if held_out["bits_per_byte"] is not None:
            rows.append(_row("bits per byte", models, {"pretrained": f"{held_out['bits_per_byte']:.3f}"}))
    if task:
        for metric in next(iter(task["scores"].values())):
            scores = {model: f"{values[metric]:.4f}" for model, values in task["scores"].items()}
            rows.append(_row(f"{metric} ({task['split']})", models, scores))
    for key, name in (("parameters", "parameters"), ("encoder_parameters", "of them in attention and feed-forward")):
        rows.append(_row(name, models, {model: f"{counts[key]:,}" for model, counts in models.items() if counts[key] is not None}))
    if latency:
        times = {model: f"{quartiles['median']:.1f} ms" for model, quartiles in latency["milliseconds"].items()}
        rows.append(_row(f"forward pass of {latency['batch_size']} x {latency['length']} tokens", models, times))
        rows.append(_row("measured speed-up", models, {model: f"{times:.2f}x" for model, times in latency["speed_up"].items()}))
    return rows


def _memory_rows(report: Report) -> Rows:
    """One row a memory."""
    head = ["memory", "nats", "perplexity", "a word", "bits per byte", "share", "tokens/s", "values"]
    return [head, *(_memory_row(row) for row in report["memories"]["rows"])]


def _memory_row(row: dict[str, Any]) -> list[str]:
    words = row["word_perplexity"]
    words = "" if words is None else f"{words:,.2f}" if words < 1e5 else f"{words:.2e}"
    values = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row["values"].items())
    figures = [f"{row['loss']:.4f}", f"{row['perplexity']:,.2f}", words, f"{row['bits_per_byte']:.4f}", f"{row['share']:.1%}"]
    return [row["memory"], *figures, f"{row['tokens_per_second']:,.0f}", values]


def _row(name: str, models: dict[str, Any], values: dict[str, str]) -> list[str]:
    return [name, *(values.get(model, "") for model in models)]


def _notes(report: Report) -> list[str]:
    held_out, latency, notes = report["held_out"], report["latency"], []
    if held_out:
        rows = f"{held_out['segments']:,} of {held_out['of_segments']:,} held-out segments"
        alone = ", without memory" if held_out["objective"] not in ("mlm", "causal") else ""
        notes.append(f"Perplexity over {held_out['targets']:,} predicted tokens in {rows}{alone}.")
    notes += _memory_notes(report["memories"]) if report.get("memories") else []
    if latency:
        spread = "; ".join(f"{model} {t['lower_quartile']:.1f} to {t['upper_quartile']:.1f} ms" for model, t in latency["milliseconds"].items())
        on = f"{latency['device']}, {latency['threads']} threads" if latency["threads"] else latency["device"]
        notes.append(f"Times are medians of {latency['repeats']} passes taken in turn on {on}; quartiles {spread}.")
    notes.append(", ".join(f"{package} {version}" for package, version in report["versions"].items()) + f"; {report['device']}.")
    return notes


def _memory_notes(memories: dict[str, Any]) -> list[str]:
    window, long = memories["window"], memories["long"]
    read = (
        f"windows of {window['block']} tokens with {window['context']} before them{', which stop where documents do' * memories['within_documents']}"
    )
    tuned = f"values tuned on {memories['development_documents']:,} others" if memories["development_documents"] else "no value was tuned"
    text = f"{memories['tokens']:,} tokens ({memories['words']:,} words, {memories['bytes']:,} bytes) of {memories['documents']:,} held-out documents"
    notes = [
        f"Memories: {text}, read in {read}; {tuned}.",
        "Nats and perplexity are of a token, or of a word between white space; share is the memory's, of probability; speed counts model and memory.",
    ]
    if any("long" in row["memory"] for row in memories["rows"]):
        emptied = "emptied where a document ends" if long["reset"] else "never emptied"
        notes.append(f"Long memory: the last {long['size']:,} scored places before the window, {emptied}.")
    return notes + [f"Warning, {row['memory']}: {warning}." for row in memories["rows"] for warning in row["warnings"]]


def _metrics(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in metrics.items() if not isinstance(value, dict | list))


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _markdown_table(rows: Rows) -> str:
    head, *body = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])
