"""The masks of a pruning, and the constraint they are under: what is trained beside the student (`Trainee.side`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.compression.hard_concrete import HardConcrete
from pipeline.compression.settings import SparsitySettings
from pipeline.compression.sparsity import Lagrangian, Prunable

INITIAL = {"heads": 3.0, "neurons": 2.0}
"""Where log alpha starts: masks nearly open, yet off the plateau. From the official 10 (heads) a mask has further to travel than a few
hundred steps take it; from 0 (neurons) the student meets masks of a half at once."""


class Masks(nn.Module):
    """Hard-concrete masks of the chosen units of a student, and the Lagrange multipliers.

    steps: of the whole optimisation; the first `prepruning_ratio` of them leave the student whole.
    All ranks hold the same: the start and every draw are functions of (seed, step).
    """

    def __init__(self, prunable: Prunable, settings: SparsitySettings, *, steps: int, seed: int) -> None:
        super().__init__()
        self.prunable, self.settings, self.seed = prunable, settings, seed
        self.start = round(settings.prepruning_ratio * steps)
        shapes = {"heads": (prunable.layers, prunable.heads), "neurons": (prunable.layers, prunable.ffn)}
        generator = torch.Generator().manual_seed(seed)
        self.units = nn.ModuleDict({unit: HardConcrete(shapes[unit], initial=INITIAL[unit], generator=generator) for unit in settings.units})
        self.lagrangian = Lagrangian(settings.target, round(settings.warmup_ratio * steps))
        self._step = 0

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam without decay or schedule; it descends on the masks and ascends on the multipliers."""
        groups: list[dict[str, Any]] = [{"params": list(self.units.parameters())}, {"params": list(self.lagrangian.parameters()), "maximize": True}]
        return torch.optim.Adam(groups, lr=self.settings.mask_lr)

    def before_step(self, step: int) -> None:
        """Begin a step: its draw holds for all its micro-batches."""
        self._step = step

    def sample(self) -> dict[str, Tensor] | None:
        """This step's masks by unit; None before pruning begins."""
        if self._step < self.start:
            return None
        draws = np.random.default_rng([self.seed, self._step])
        noise = {unit: torch.from_numpy(draws.random(mask.log_alpha.shape, np.float32)).to(mask.log_alpha.device) for unit, mask in self._each()}
        return {unit: mask.sample(noise[unit]) for unit, mask in self._each()}

    def penalty(self) -> Tensor:
        """The Lagrangian at this step; a constant 0 before pruning begins."""
        if self._step < self.start:
            return torch.zeros((), device=self.lagrangian.multipliers.device)
        return self.lagrangian(self.expected_sparsity(), self._step - self.start)

    def after_step(self, step: int) -> dict[str, float]:
        """Clamp log alpha; what to log."""
        for _, mask in self._each():
            mask.clamp_()
        with torch.no_grad():
            alive = self.deterministic()
            kept = {f"{unit}_alive": (mask > 0).sum() for unit, mask in alive.items()}
            values = {"expected_sparsity": self.expected_sparsity(), "realised_sparsity": self.realised_sparsity(alive), **kept}
            first, second = self.lagrangian.multipliers
            values |= {"lambda_1": first, "lambda_2": second}
            numbers = torch.stack([value.float() for value in values.values()]).tolist()  # one wait for the device
        return {**dict(zip(values, numbers, strict=True)), "target_sparsity": self.lagrangian.target_at(step - self.start)}

    def expected_sparsity(self) -> Tensor:
        return self.prunable.sparsity({unit: mask.keep_probability() for unit, mask in self._each()})

    def realised_sparsity(self, masks: dict[str, Tensor]) -> Tensor:
        """Of deterministic masks: what removing their zeros removes."""
        return self.prunable.sparsity({unit: (mask > 0).float() for unit, mask in masks.items()})

    def deterministic(self, shifts: dict[str, float] | None = None) -> dict[str, Tensor]:
        """The masks of evaluation by unit. shifts: by unit, added to log alpha where zeros are counted."""
        return {unit: mask.deterministic((shifts or {}).get(unit, 0.0)) for unit, mask in self._each()}

    def settle(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The masks to remove by, and the shifts of log alpha that bring what they remove to the target.

        The expected sparsity ends near the target, not on it, and hard-concrete tails keep it from 0 and 1. So the counts of the evaluation rule
        are taken at log alpha plus one number for all units, then plus one more for the finest unit, each found by bisection.
        Which units of a layer go first, and the values of those kept, stay as trained.
        """
        units = [unit for unit, _ in self._each()]
        shifts = dict.fromkeys(units, 0.0)
        for shifted in (units, units[-1:]):
            low, high = -20.0, 20.0
            candidates = []
            for _ in range(40):
                middle = (low + high) / 2
                trial = {unit: shifts[unit] + (middle if unit in shifted else 0.0) for unit in units}
                sparsity = self.realised_sparsity(self.deterministic(trial)).item()
                candidates.append((abs(sparsity - self.settings.target), trial))
                low, high = (middle, high) if sparsity > self.settings.target else (low, middle)
            shifts = min(candidates, key=lambda candidate: candidate[0])[1]
        return self.deterministic(shifts), shifts

    def _each(self) -> list[tuple[str, HardConcrete]]:
        return [(unit, self.units[unit]) for unit in INITIAL if unit in self.units]  # type: ignore[misc] # coarse units first
