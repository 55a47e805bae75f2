"""What masks leave of an encoder, in numbers: for the terminal, a file, a picture; and which layers went first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from pipeline.compression.sparsity import Prunable

Structure = dict[str, Any]
"""Plain JSON values.

layers: for each, from the bottom, its number from 1 (`layer`), how many `heads` and `neurons` are left, `of_heads` and `of_neurons`, and which:
`which_heads`, `which_neurons`, numbered from 0, as runs such as "0-5,8". dimensions, of_dimensions, which_dimensions: the residual stream's.
"""
BAR = 24
"""Characters of a bar of neurons."""


def structure(masks: Mapping[str, Tensor], prunable: Prunable) -> Structure:
    """Of masks as for `surgery.remove`: a unit stays where neither its own mask nor its layer's is 0, and where there is no mask."""
    kept = {unit: (masks[unit].cpu() if unit in masks else torch.ones(shape)) != 0 for unit, shape in prunable.shapes.items()}
    heads, neurons = kept["heads"] & kept["attention"][:, None], kept["neurons"] & kept["feedforward"][:, None]
    layers = [
        {"layer": number, **_count("heads", of_heads), **_count("neurons", of_neurons)}
        for number, (of_heads, of_neurons) in enumerate(zip(heads, neurons, strict=True), start=1)
    ]
    return {"layers": layers, **_count("dimensions", kept["hidden"])}


def table(structure: Structure) -> Table:
    """A structure for the terminal, the top layer first: which heads, a mark each, and how many neurons."""
    shown = Table("layer", "heads", "which", "neurons", "share", title="What is left of the encoder")
    if structure["dimensions"] < structure["of_dimensions"]:
        shown.caption = f"{structure['dimensions']} of {structure['of_dimensions']} dimensions"
    for row in reversed(structure["layers"]):
        heads = numbers(row["which_heads"])
        marks = "".join("x" if head in heads else "." for head in range(row["of_heads"]))
        share = row["neurons"] / row["of_neurons"]
        bar = "#" * max(round(BAR * share), row["neurons"] > 0)
        neurons = f"{row['neurons']} of {row['of_neurons']}"
        shown.add_row(str(row["layer"]), f"{row['heads']} of {row['of_heads']}", marks, neurons, f"{bar:.<{BAR}}")
    return shown


def numbers(runs: str) -> list[int]:
    """What `runs` wrote."""
    bounds = [[int(bound) for bound in run.split("-")] for run in runs.split(",") if run]
    return [number for bound in bounds for number in range(bound[0], bound[-1] + 1)]


def runs(found: Iterable[int]) -> str:
    """Rising numbers as runs: 0, 1, 2, 3, 4, 5, 8 are "0-5,8"."""
    found = list(found)
    if not found:
        return ""
    breaks = [0, *(place for place, (one, next_one) in enumerate(pairwise(found), start=1) if next_one != one + 1), len(found)]
    ends = [(found[start], found[end - 1]) for start, end in pairwise(breaks)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


class Death(NamedTuple):
    """A sub-layer (`attention` or `feedforward`) of a layer, from 1, is gone since this step."""

    step: int
    sublayer: str
    layer: int


def deaths(records: Iterable[Mapping[str, Any]]) -> list[Death]:
    """Sub-layers that are dead at the end of a pruning, the first to go first; at equal steps the lower.

    records: the lines of its `metrics.jsonl`, whose `side` has `attention_alive_3` and the like, 1 or 0. What came back to life counts from its last
    death.
    """
    since: dict[tuple[str, int], int] = {}
    for record in records:
        for name, lives in record["side"].items():
            sublayer, alive, layer = name.partition("_alive_")
            if alive and lives:
                since.pop((sublayer, int(layer)), None)
            elif alive:
                since.setdefault((sublayer, int(layer)), record["step"])
    return sorted((Death(step, *place) for place, step in since.items()), key=lambda death: (death.step, death.layer, death.sublayer))


def _count(name: str, kept: Tensor) -> dict[str, Any]:
    return {name: int(kept.sum()), f"of_{name}": len(kept), f"which_{name}": runs(kept.nonzero().flatten().tolist())}
