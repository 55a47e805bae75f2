"""How long an encoder's blocks take on the present machine, and what masks make of it.

Masks under a constraint on time, in place of parameters, need it as a function of keep probabilities. A table of measured blocks is such a
function once its points are joined by lines (the latency table of ZipLM, Kurtic et al. 2023, section 3.2, made differentiable).
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from pipeline.artifacts import write_json
from pipeline.compression.sparsity import FINE, Prunable
from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineModel
from pipeline.models.positions import SCHEMES, attention_heads, full_width
from pipeline.models.stopwatch import device_name, milliseconds

POINTS = 12
"""Numbers of neurons that are measured, from 1 to all of a layer."""


@dataclass(frozen=True)
class Table:
    """Milliseconds of one layer's sub-layers, residual and LayerNorm included; embeddings and what comes after the layers do not count.

    attention: by width of the residual stream (`widths`) and number of heads (`heads`, from 0); feedforward: by width and number of neurons
    (`neurons`, from 0). No unit, no time: the sub-layer is gone. Times never fall with the number of units.
    rows, length: of the batch. device: its name. threads: of the CPU, None on a GPU.
    """

    layers: int
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    attention: tuple[tuple[float, ...], ...]
    feedforward: tuple[tuple[float, ...], ...]
    rows: int
    length: int
    device: str
    threads: int | None

    @classmethod
    def measure(
        cls,
        config: TrimlineConfig,
        *,
        rows: int,
        length: int,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        repeats: int = 9,
        widths: Sequence[int] | None = None,
    ) -> Table:
        """The median of `repeats` passes through each kind of block of an encoder that is to be pruned, in fp32.

        On a CPU others' load does not count where threads are 1; several threads need the machine to themselves.

        widths: rising, up to the whole; None: the whole alone. Dimensions can be pruned by a table of several.
        Raises UserError for a length that the model has no positions for.
        """
        if SCHEMES[config.positions].bounded and length > config.max_position_embeddings:
            raise UserError(f"prune: rows of {length} tokens are to be timed, the model has positions for {config.max_position_embeddings}")
        prunable, device = Prunable.of(config), torch.device(device)
        widths = tuple(widths or (prunable.hidden,))
        heads, neurons = tuple(range(prunable.heads + 1)), _grid(prunable.ffn)
        kinds = [("attention", number) for number in heads[1:]] + [("feedforward", number) for number in neurons[1:]]
        with torch.inference_mode():
            inputs = {width: torch.randn(rows, length, width, device=device) for width in widths}
            blocks = {(kind, width, number): _block(config, kind, number, inputs[width]) for width in widths for kind, number in kinds}
            times, threads = milliseconds(blocks, repeats, device, threads, time.thread_time)

        def table(kind: str, grid: Sequence[int]) -> tuple[tuple[float, ...], ...]:
            measured = [[0.0, *(statistics.median(times[kind, width, number]) for number in grid[1:])] for width in widths]
            return tuple(tuple(row) for row in _rising(np.array(measured)).tolist())

        found = table("attention", heads), table("feedforward", neurons)
        return cls(prunable.layers, widths, heads, neurons, *found, rows, length, device_name(device), threads)

    @classmethod
    def open(cls, path: Path) -> Table:
        """As it was saved."""
        return cls(**{name: _tuples(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()})

    def save(self, path: Path) -> None:
        """As JSON, so that what is resumed has the same numbers."""
        write_json(path, asdict(self))

    @property
    def dense(self) -> float:
        """Milliseconds of the whole encoder."""
        return self.layers * (self.attention[-1][-1] + self.feedforward[-1][-1])

    def time(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Milliseconds of a pruned encoder, a scalar: expected, from keep probabilities, or predicted, from zeros and ones.

        keep: by unit, of `Prunable.shapes`; a unit that is absent is kept whole. A sub-layer's time is that of the expected number of its units, on a
        line between the numbers measured, times its own keep probability. Below the narrowest width measured, dimensions save no more.
        """
        return self.time_of("attention", keep) + self.time_of("feedforward", keep)

    def time_of(self, layer: str, keep: Mapping[str, Tensor]) -> Tensor:
        """The same of sub-layers of one kind, `attention` or `feedforward`."""
        fine = FINE[layer]
        like = next(iter(keep.values()), torch.zeros(()))
        counts = keep[fine].sum(-1) if fine in keep else like.new_full((self.layers,), self._measured(layer)[0][-1], dtype=torch.float32)
        times = self.times(layer, counts, keep)
        return (times * keep[layer] if layer in keep else times).sum()

    def times(self, layer: str, counts: Tensor, keep: Mapping[str, Tensor]) -> Tensor:
        """Milliseconds of sub-layers of one kind with so many heads or neurons, of the shape of `counts`, at the width that is kept."""
        assert "hidden" not in keep or len(self.widths) > 1, "a table of one width says nothing of dimensions"
        grid, measured = self._measured(layer)
        by_number = torch.tensor(measured, dtype=torch.float32, device=counts.device)
        width = keep["hidden"].sum().clamp(min=self.widths[0]) if "hidden" in keep else None
        return _between(grid, by_number[-1] if width is None else _between(self.widths, by_number, width), counts)

    def _measured(self, layer: str) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
        """Numbers of units, and times by width and these."""
        return (self.heads, self.attention) if layer == "attention" else (self.neurons, self.feedforward)

    def saved(self, keep: Mapping[str, Tensor]) -> Tensor:
        """The share of the whole encoder's time that is gone, which takes the place of the sparsity: 1 - 1 / speed-up."""
        return 1 - self.time(keep) / self.dense

    def speed_up(self, keep: Mapping[str, Tensor]) -> Tensor:
        """How many times faster than the whole encoder; infinite where nothing is left."""
        return self.dense / self.time(keep)


def _between(grid: Sequence[int], values: Tensor, at: Tensor) -> Tensor:
    """values [grid, ..] joined by lines, at points of any shape (of which each has the rest of the values' shape, or the values have no more)."""
    points = torch.tensor(grid, dtype=torch.float32, device=values.device)
    left = (torch.searchsorted(points, at.detach().float().contiguous(), right=True) - 1).clamp(0, len(grid) - 2)
    share = (at - points[left]) / (points[left + 1] - points[left])
    return values[left] + share * (values[left + 1] - values[left])


def _grid(neurons: int) -> tuple[int, ...]:
    """0, 1, and multiples of 8 by about equal ratios from a sixty-fourth of the neurons to all."""
    wide = np.geomspace(max(8, neurons / 64), neurons, POINTS - 1)
    return tuple(sorted({0, 1, *(min(neurons, 8 * round(number / 8)) for number in wide), neurons}))


def _rising(times: np.ndarray) -> np.ndarray:
    """A table [widths, numbers] as the nearest, in the mean of squares, that does not fall along the numbers, then along the widths: noise makes a
    smaller block seem the slower."""
    for axis in (1, 0):
        times = np.apply_along_axis(isotonic_regression, axis, times)
    return times


def _block(config: TrimlineConfig, kind: str, number: int, x: Tensor) -> Callable[[], object]:
    """A pass of x [B, L, width] through a layer that has this sub-layer alone, with what the model's positions give it."""
    heads, neurons = (number, 0) if kind == "attention" else (0, number)
    single = copy.deepcopy(config)
    single.full_hidden_size, single.hidden_size = full_width(config), x.shape[-1]
    single.heads_per_layer, single.ffn_per_layer, single.num_hidden_layers = [heads], [neurons], 1
    single.heads_kept = [list(range(heads))] if 0 < heads < attention_heads(config) else None
    single.vocab_size, single.adaptive, single.unpadded = 0, None, False
    model = TrimlineModel(single, add_pooling_layer=False).to(x.device).eval()  # type: ignore[arg-type]
    (layer,), given = model.layers, []
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    model(inputs_embeds=x[:1])
    hook.remove()
    return partial(layer, x, *given[0][1:])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
