"""How well a language model predicts held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.objectives.base import Objective
from pipeline.packing.loader import Loader

STEP = 0
"""Draws about the data (masking) are those of this step, so that two models meet the same targets."""


@dataclass(frozen=True)
class HeldOut:
    """loss: mean over `targets` predicted tokens, in nats; they lie in `segments` rows of the `of_segments` there are."""

    loss: float
    targets: int
    segments: int
    of_segments: int

    @property
    def perplexity(self) -> float:
        """exp(loss); of masked tokens where the objective masks."""
        return math.exp(self.loss)

    def bits_per_byte(self, tokens: int, text_bytes: int) -> float:
        """The loss by the size of the text, which no tokenizer changes: bits a token times tokens a byte of the held-out split.

        tokens, text_bytes: of the whole split, end tokens counted, so that rows left out and tokens dropped in packing take nothing away.
        """
        return self.loss / math.log(2) * tokens / text_bytes


@torch.no_grad()
def score(
    model: nn.Module, objective: Objective, loader: Loader, *, batch_size: int, max_segments: int | None = None, device: torch.device | str = "cpu"
) -> HeldOut:
    """The objective's loss over the plan's segments, each once; with max_segments, that many evenly spaced ones.

    The objective has one loss. The model is put on the device, in evaluation mode.
    """
    model, objective = model.to(device).eval(), objective.to(device)
    of_segments = len(loader.plan.segments) - 1
    count = min(max_segments or of_segments, of_segments)
    chosen = np.arange(count) * of_segments // count
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets = torch.zeros((), dtype=torch.int64, device=device)
    for first in range(0, count, batch_size):
        rows = loader.rows(chosen[first : first + batch_size])
        batch = objective.prepare({name: torch.from_numpy(array).to(device) for name, array in rows.items()}, STEP)
        (loss,) = objective(model, batch, STEP).values()
        (predicted,) = objective.targets(batch).values()
        total += loss.double() * predicted
        targets += predicted
    return HeldOut(total.item() / max(targets.item(), 1), int(targets.item()), count, of_segments)
