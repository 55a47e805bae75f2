"""What a pruning is to reach: a share of the parameters or of the time, or a shape; checked against what its units can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.compression import shapes
from pipeline.compression.knapsack import deal
from pipeline.compression.latency import Table
from pipeline.compression.masks import Masks
from pipeline.compression.settings import SparsitySettings
from pipeline.compression.shapes import Shape
from pipeline.compression.sparsity import FINE, Prunable, Removed
from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineConfig


@dataclass(frozen=True)
class Goal:
    """name: of its directory. share: to remove, as `removed` measures it. head_share: of what is kept, attention's; None where it may come as it
    will. shape: what is to be left exactly, where that is the goal. table: of what is timed, where the share is one of time."""

    name: str
    share: float
    removed: Removed
    head_share: float | None = None
    shape: Shape | None = None
    table: Table | None = None


def goals(settings: SparsitySettings, prunable: Prunable, table: Table | None = None, *, multiple: int = 1, together: bool = False) -> list[Goal]:
    """In the order in which they are reached. table: of the present machine, where speed-ups are asked for. multiple: of the widths that stay.
    together: whether something stays of attention as of feed-forward, not of one of them alone.

    Raises UserError for what the units cannot reach, with the most that they can while anything is left.
    """
    found = _asked(settings, prunable, table)
    removed, share = found[-1].removed, found[-1].share
    steps = shapes.steps(multiple, prunable.hidden // prunable.heads)
    least = {unit: _first(prunable.shapes[unit], steps.get(unit, 1)) for unit in settings.units}
    whole = [] if together else [{layer, fine} for layer, fine in FINE.items() if {layer, fine} & set(settings.units)]
    most = max(removed({unit: mask * (unit not in gone) for unit, mask in least.items()}).item() for gone in whole or [set()])
    if share > most + 1e-6:  # of fp32
        wanted, can = (f"a speed-up of {1 / (1 - each):.3g}" if table is not None else f"{each:.4g}" for each in (share, most))
        what = "target shape, of all that can go," if settings.shape else "target"
        units = ", ".join(settings.units)
        raise UserError(f"prune: the {what} is {wanted}; sparsity.units {units} make at most {can}; lower the target, or add units")
    return found


def _asked(settings: SparsitySettings, prunable: Prunable, table: Table | None) -> list[Goal]:
    if settings.shape is not None:
        given = settings.shape.model_dump()
        shape = Shape(**{**given, "hidden": given["hidden"] or prunable.hidden})
        left = shapes.to_shape({unit: torch.ones(prunable.shapes[unit]) for unit in settings.units}, shape, prunable)
        share = prunable.sparsity(left).item()
        without_heads = prunable.sparsity({**left, "heads": torch.zeros(prunable.shapes["heads"])}).item()
        return [Goal("shape", share, prunable.sparsity, (without_heads - share) / (1 - share), shape)]
    if table is not None:
        return [Goal(f"{speed_up:g}x", 1 - 1 / speed_up, table.saved, settings.head_share, table=table) for speed_up in settings.speed_up]
    return [Goal(f"{target:g}", target, prunable.sparsity, settings.head_share) for target in settings.target]


def _first(shape: tuple[int, ...], step: int) -> Tensor:
    """Zeros of that shape but for the first `step`, of heads and neurons in the first layer alone."""
    mask = torch.zeros(shape)
    mask[(0,) * (len(shape) - 1)][:step] = 1.0
    return mask


def settle(masks: Masks, goal: Goal, multiple: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The masks to remove by, of the goal's shape, or as near its share as widths in multiples allow; and the shifts of log alpha behind them."""
    if goal.shape is not None:
        soft, kept = masks.soft(), shapes.to_shape(masks.scores, goal.shape, masks.prunable)
        layers = kept["heads"].any(-1).float()
        stays = {"attention": layers, "feedforward": layers, "hidden": torch.ones_like(layers[:1])} | kept
        return {unit: mask * soft.get(unit, 1.0) for unit, mask in stays.items() if unit in kept or unit in soft}, {}
    head_dim = masks.prunable.hidden // masks.prunable.heads
    found, shifts = masks.settle(lambda found: shapes.round_up(found, masks.scores, multiple, head_dim))
    return dealt(found, masks.worth(), goal, multiple, head_dim), shifts


def dealt(masks: dict[str, Tensor], worth: Mapping[str, Tensor], goal: Goal, multiple: int, head_dim: int) -> dict[str, Tensor]:
    """The masks; of a goal of time with their units where they are worth the most in it."""
    return masks if goal.table is None else deal(goal.table, masks, worth, 1 - goal.share, shapes.steps(multiple, head_dim))


def measured(settings: SparsitySettings, config: TrimlineConfig, path: Path, device: torch.device) -> None:
    """Writes the machine's table for a model, unless it was written before."""
    if not path.is_file():
        timing = settings.timing
        hidden = config.hidden_size
        widths = list(_widths(hidden)) if "hidden" in settings.units else None
        Table.measure(config, rows=timing.rows, length=timing.length, device=device, threads=timing.threads, widths=widths).save(path)


def _widths(hidden: int) -> Iterator[int]:
    """A quarter, a half, three quarters of the dimensions, and all."""
    return (max(1, hidden * quarter // 4) for quarter in (1, 2, 3, 4))
