"""Values chosen from grids for the least loss on a development split."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pipeline.memory.mixtures import Parameter


@dataclass(frozen=True)
class Tuned:
    """values by name, the loss they give (None where nothing was tuned), and a warning for each that lies on an end of its grid, so that a
    better one may lie beyond."""

    values: dict[str, float]
    loss: float | None
    warnings: list[str]


def tune(loss: Callable[[Mapping[str, float]], float], parameters: Mapping[str, Parameter]) -> Tuned:
    """Coordinate descent: the best value of each grid in turn, the others held, until none improves the loss.

    Temperature and bias trade against one another, which leaves valleys across the coordinates; so, at rest, steps to the neighbours of two
    values at once are tried too. Parameters of one value are fixed. A grid rises; the start is the point of it nearest to `start`.
    """
    grids = {name: parameter.grid for name, parameter in parameters.items()}
    at = {name: min(range(len(grid)), key=lambda i: abs(grid[i] - parameters[name].start)) for name, grid in grids.items()}
    known: dict[tuple[int, ...], float] = {}

    def value(place: dict[str, int]) -> float:
        key = tuple(place.values())
        if key not in known:
            known[key] = loss({name: grids[name][i] for name, i in place.items()})
        return known[key]

    free = [name for name, grid in grids.items() if len(grid) > 1]
    best, improved = value(at), True
    while improved:
        improved = False
        for group in ([name] for name in free):
            at, best, better = _better(value, _along(at, group[0], grids), at, best)
            improved |= better
        if not improved:
            at, best, improved = _better(value, _diagonals(at, free, grids), at, best)
    values = {name: grids[name][i] for name, i in at.items()}
    return Tuned(values, best, [_warning(name, values[name], grids[name]) for name in free if _on_edge(values[name], parameters[name])])


def _better(
    value: Callable[[dict[str, int]], float], places: Iterator[dict[str, int]], at: dict[str, int], best: float
) -> tuple[dict[str, int], float, bool]:
    found = min(places, key=value, default=at)
    return (found, value(found), True) if value(found) < best else (at, best, False)


def _along(at: dict[str, int], name: str, grids: Mapping[str, tuple[float, ...]]) -> Iterator[dict[str, int]]:
    return ({**at, name: i} for i in range(len(grids[name])))


def _diagonals(at: dict[str, int], free: list[str], grids: Mapping[str, tuple[float, ...]]) -> Iterator[dict[str, int]]:
    for one, other in itertools.combinations(free, 2):
        for i, j in itertools.product((at[one] - 1, at[one] + 1), (at[other] - 1, at[other] + 1)):
            if 0 <= i < len(grids[one]) and 0 <= j < len(grids[other]):
                yield {**at, one: i, other: j}


def _on_edge(value: float, parameter: Parameter) -> bool:
    return value in (parameter.grid[0], parameter.grid[-1]) and value not in parameter.natural


def _warning(name: str, value: float, grid: tuple[float, ...]) -> str:
    beyond = f"below {grid[0]:g}" if value == grid[0] else f"above {grid[-1]:g}"
    return f"{name} {value:g} is the end of its grid: a value {beyond} may be better; set evaluate.fixed.{name} to try one"
