"""Pruned models to look at. Figures are matplotlib's: `figure.savefig(path)`, or TensorBoard's `add_figure`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.compression.structure import Structure, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT, GONE = "tab:blue", "0.9"
TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 70, 100)
"""Of speed-up: one at least beside any point."""


def structure_figure(structure: Structure, title: str = "") -> Figure:
    """A row a layer, the top layer above: a square a head, and a bar of its neurons; what is gone is grey."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    layers = structure["layers"]
    figure = Figure(figsize=(9, 1.3 + 0.3 * len(layers)), dpi=100, layout="constrained")
    heads, neurons = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.4))
    for row in layers:
        kept = set(numbers(row["which_heads"]))
        colours = [KEPT if head in kept else GONE for head in range(row["of_heads"])]
        heads.barh([row["layer"]] * row["of_heads"], 0.84, height=0.84, left=[head - 0.42 for head in range(row["of_heads"])], color=colours)
        neurons.barh(row["layer"], 1.0, height=0.84, color=GONE)
        neurons.barh(row["layer"], row["neurons"] / row["of_neurons"], height=0.84, color=KEPT)
        neurons.text(1.02, row["layer"], str(row["neurons"]), va="center", fontsize="small")
    heads.set(title="heads", xlabel="head", ylabel="layer", yticks=[row["layer"] for row in layers], ylim=(0.4, len(layers) + 0.6))
    heads.set_xlim(-0.5, layers[0]["of_heads"] - 0.5)
    heads.xaxis.set_major_locator(MaxNLocator(integer=True))
    neurons.set(title=f"neurons, of {layers[0]['of_neurons']}", xlabel="share kept", xlim=(0, 1.15), xticks=[0, 0.25, 0.5, 0.75, 1])
    neurons.xaxis.set_major_formatter(PercentFormatter(1))
    for panel in (heads, neurons):
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    dimensions = f"{structure['dimensions']} of {structure['of_dimensions']} dimensions"
    figure.suptitle(f"{title}: {dimensions}" if title else dimensions, fontsize="medium")
    return figure


@dataclass(frozen=True)
class Point:
    """A pruned model. method: points of one are joined by a line; name: stands beside it, such as its sparsity."""

    method: str
    name: str
    speed_up: float
    score: float


def trade_off_figure(points: Sequence[Point], *, metric: str, teacher: float | None = None) -> Figure:
    """Score against speed-up, which is on a logarithmic axis; lines at the teacher's score and at 90 % of it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    panel = figure.subplots()
    for number, method in enumerate(dict.fromkeys(point.method for point in points)):
        of_method = sorted((point for point in points if point.method == method), key=lambda point: point.speed_up)
        marker, beside = "os^Dv"[number % 5], (4, -12 if number % 2 else 5)
        (line,) = panel.plot([point.speed_up for point in of_method], [point.score for point in of_method], f"{marker}-", label=method)
        for point in of_method:
            place = (point.speed_up, point.score)
            panel.annotate(point.name, place, beside, textcoords="offset points", fontsize="small", color=line.get_color())
    if teacher is not None:
        panel.axhline(teacher, color="0.3", linewidth=1, label="teacher")
        panel.axhline(0.9 * teacher, color="0.3", linewidth=1, linestyle="--", label="90 % of it")
    panel.set_xscale("log")
    left, right = min(point.speed_up for point in points) / 1.3, max(point.speed_up for point in points) * 1.3
    panel.set_xlim(left, right)
    panel.set_xticks([tick for tick in TICKS if left <= tick <= right])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set(xlabel="speed-up of the encoder", ylabel=metric)
    panel.margins(y=0.12)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    return figure
