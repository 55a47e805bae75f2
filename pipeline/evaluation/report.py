"""What a run made: JSON for programs, Markdown to keep, the results as a table for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from pipeline import artifacts

Report = dict[str, Any]
"""name; stages: list of {stage, seconds, metrics}; versions; device; and, where the recipe made such models,
held_out: {objective, loss, perplexity, bits_per_byte or None, targets, segments, of_segments};
task: {split, metric, scores: {model: {metric: value}}}; models: {model: {parameters, encoder_parameters or None}};
latency: as `speed.latency` gives it. What is missing is None or empty."""

Rows = list[list[str]]


def write(report: Report, directory: Path) -> None:
    """`report.json` and `report.md`."""
    artifacts.write_json(directory / "report.json", report)
    (directory / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: Report) -> str:
    notes = "\n".join(f"- {note}" for note in _notes(report))
    parts = [f"# {report['name']}", "## Stages", _markdown_table(_stage_rows(report)), "## Results", _markdown_table(_result_rows(report)), notes]
    return "\n\n".join(parts) + "\n"


def table(report: Report) -> Group:
    """The results for the terminal, for rich to print."""
    head, *body = _result_rows(report)
    shown = Table(*head, title="Results", title_justify="left")
    for row in body:
        shown.add_row(*row)
    return Group(shown, *_notes(report))


def headline(report: Report) -> dict[str, Any]:
    """What the manifest of the stage says."""
    held_out, task, latency = report["held_out"], report["task"], report["latency"]
    figures: dict[str, Any] = {}
    if held_out:
        figures["mlm_perplexity" if held_out["objective"] == "mlm" else "perplexity"] = round(held_out["perplexity"], 3)
        if held_out["bits_per_byte"] is not None:
            figures["bits_per_byte"] = round(held_out["bits_per_byte"], 4)
    if task:
        figures |= {f"{task['split']}_{task['metric']}_{_key(model)}": round(scores[task["metric"]], 4) for model, scores in task["scores"].items()}
    if latency and "pruned" in latency["speed_up"]:
        figures["speed_up"] = round(latency["speed_up"]["pruned"], 2)
    return figures


def _key(model: str) -> str:
    return model.replace("-", "")


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
        scores = {model: f"{values[task['metric']]:.4f}" for model, values in task["scores"].items()}
        rows.append(_row(f"{task['metric']} ({task['split']})", models, scores))
    for key, name in (("parameters", "parameters"), ("encoder_parameters", "of them in attention and feed-forward")):
        rows.append(_row(name, models, {model: f"{counts[key]:,}" for model, counts in models.items() if counts[key] is not None}))
    if latency:
        times = {model: f"{quartiles['median']:.1f} ms" for model, quartiles in latency["milliseconds"].items()}
        rows.append(_row(f"forward pass of {latency['batch_size']} x {latency['length']} tokens", models, times))
        rows.append(_row("measured speed-up", models, {model: f"{times:.2f}x" for model, times in latency["speed_up"].items()}))
    return rows


def _row(name: str, models: dict[str, Any], values: dict[str, str]) -> list[str]:
    return [name, *(values.get(model, "") for model in models)]


def _notes(report: Report) -> list[str]:
    held_out, latency, notes = report["held_out"], report["latency"], []
    if held_out:
        rows = f"{held_out['segments']:,} of {held_out['of_segments']:,} held-out segments"
        notes.append(f"Perplexity over {held_out['targets']:,} predicted tokens in {rows}.")
    if latency:
        spread = "; ".join(f"{model} {t['lower_quartile']:.1f} to {t['upper_quartile']:.1f} ms" for model, t in latency["milliseconds"].items())
        on = f"{latency['device']}, {latency['threads']} threads" if latency["threads"] else latency["device"]
        notes.append(f"Times are medians of {latency['repeats']} passes taken in turn on {on}; quartiles {spread}.")
    notes.append(", ".join(f"{package} {version}" for package, version in report["versions"].items()) + f"; {report['device']}.")
    return notes


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
