"""Curves of `acceleration.py`: where they reach a goal, and how they look, as PNG and in TensorBoard."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Curve = Mapping[int, float]
"""Step -> loss."""
Curves = Mapping[tuple[str, int], Mapping[str, Curve]]
"""(arm, seed) -> measure -> curve."""


def reached(curve: Curve, goal: float) -> float | None:
    """The first step at which a curve, its points joined by lines, is as low as the goal; None where it never is."""
    before: tuple[int, float] | None = None
    for step, loss in sorted(curve.items()):
        if loss <= goal:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - goal) / (before[1] - loss)
        before = step, loss
    return None


def at(curve: Curve, step: float) -> float:
    """The loss at a step, points joined by lines."""
    steps = sorted(curve)
    return float(np.interp(step, steps, [curve[each] for each in steps]))


def draw(curves: Curves, times: Mapping[str, float], path: Path) -> None:
    """One row of panels by steps and, where times are known, one by time; a colour an arm, its seeds averaged; warm arms are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = list(dict.fromkeys(measure for found in curves.values() for measure in found))
    names = list(dict.fromkeys(name for name, _ in curves))
    axes = [None, *([times] if times else [])]
    size = (5 * len(measures) + 2.5, 4 * len(axes))
    figure, panels = pyplot.subplots(len(axes), len(measures), figsize=size, squeeze=False, layout="constrained")
    colours = {name: pyplot.get_cmap("turbo")(number / max(len(names) - 1, 1)) for number, name in enumerate(names)}
    for row, axis in zip(panels, axes, strict=True):
        for panel, measure in zip(row, measures, strict=True):
            for name in names:
                found = [by_measure[measure] for (arm, _), by_measure in curves.items() if arm == name and measure in by_measure]
                if not found or (axis is not None and name not in axis):
                    continue
                steps = sorted(set(found[0]) - {0})
                x = [step * (axis[name] / 1000 if axis else 1) for step in steps]
                y = [statistics.mean(curve[step] for curve in found) for step in steps]
                panel.plot(x, y, color=colours[name], label=name, linestyle="--" if name.startswith("warm") else "-")
            panel.set_xlabel("seconds of one thread" if axis else "steps")
            panel.set_ylabel(f"{measure}, nats")
            panel.grid(alpha=0.3)
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def scalars(curves: Curves, directory: Path) -> None:
    """The same for TensorBoard, a run an arm and seed."""
    from torch.utils.tensorboard import SummaryWriter

    for (name, seed), found in curves.items():
        place = directory / f"{name}-{seed}"
        for old in place.glob("events*"):
            old.unlink()
        with SummaryWriter(str(place)) as board:
            for measure, curve in found.items():
                for step, loss in sorted(curve.items()):
                    board.add_scalar(f"held out/{measure}", loss, step)
