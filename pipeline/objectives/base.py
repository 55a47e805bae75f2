"""What a model is trained for, and what the training loop trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

Batch = dict[str, Tensor]


class Objective(nn.Module, ABC):
    """Named losses of a model on a batch. May own further networks; they are trained with the model."""

    predicted: float = 1.0
    """Share of a row's positions that are predicted: what the vocabulary projection costs."""
    figures: frozenset[str] = frozenset()
    """Those of the named losses that are logged, not trained on."""
    ratios: Mapping[str, tuple[str, str]] = {}
    """What is logged besides: a name, and the two named losses whose quotient it is, such as hits among all of a kind."""

    notes: Any = None
    """Notes on rare words, read and written around the forward pass; None: none. The trainee's side module, so no registered part of this one."""

    def take_notes(self, notes: nn.Module) -> None:
        """Reads and writes these notes from now on."""
        object.__setattr__(self, "notes", notes)  # an ordinary attribute would register it, and DeepSpeed would train it

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weights of the named losses in the sum where they are not 1; a recipe's own come before them."""
        return {}

    @abstractmethod
    def prepare(self, batch: Batch, step: int) -> Batch:
        """The batch with its draws about the data made (masking) and `labels` added; -100 is no target.

        A row of the result depends on that row and `step` alone, not on the rows beside it.
        """

    @abstractmethod
    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """For each named loss, how many targets of this prepared batch it is a mean over: int64 scalars."""

    def training_flops_per_row(self, length: int) -> float:
        """Floating-point operations of training on a row of `length` tokens, forward and backward, besides the model's: in further networks."""
        return 0.0

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Named scalar mean losses of a prepared batch. A loss without a target in this batch is 0, not nan."""


class Trainee(nn.Module):
    """A model and its objective bound together: all that the training loop sees.

    side: fp32 module kept outside DeepSpeed, or None (see DESIGN.md).
    figures, ratios: what is only logged, see `Objective`.
    flops_per_row: floating-point operations of training on one row, forward and backward, for the utilisation (MFU)
        that the loop logs; None where it is not known.
    """

    side: nn.Module | None

    def __init__(self, model: nn.Module, objective: Objective, *, side: nn.Module | None = None, flops_per_row: float | None = None):
        super().__init__()
        self.model = model
        self.objective = objective
        self.figures, self.ratios = objective.figures, objective.ratios
        object.__setattr__(self, "side", side)  # an ordinary attribute would register it, and DeepSpeed would train it
        self.flops_per_row = flops_per_row

    def prepare(self, batch: Batch, step: int) -> Batch:
        return self.objective.prepare(batch, step)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        return self.objective.targets(batch)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.objective(self.model, batch, step)
