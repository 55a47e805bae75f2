"""The masks of a pruning, and the constraint they are under: what is trained beside the student (`Trainee.side`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.compression.hard_concrete import HardConcrete
from pipeline.compression.settings import SparsitySettings
from pipeline.compression.sparsity import FINE, PENALTY, Lagrangian, Part, Prunable, Removed, parts, realised, within_layers

INITIAL = {"attention": 4.0, "feedforward": 4.0, "heads": 3.0, "hidden": 4.0, "neurons": 2.0}
"""Where log alpha starts, by unit, from the coarsest to the finest: masks nearly open, yet off the plateau. From the official 10 a mask has further
to travel than a few hundred steps take it; from 0 (neurons) the student meets masks of a half at once. What takes much of the student with it starts
higher: of heads a fifth is below 1 in a draw, of layers a twelfth."""
GATES = ("attention", "feedforward")
TRACE = 1e-4
"""That a closed unit is worth: thousands of them do not outweigh one that is open."""


class Masks(nn.Module):
    """Hard-concrete masks of the chosen units of a student, and the Lagrange multipliers.

    steps: of the whole optimisation; the first `prepruning_ratio` of them leave the student whole. target: the share to remove, as `removed`
    measures it, of the parameters (`Prunable.sparsity`) where None. head_share: of what is kept, attention's; see `sparsity.parts`.
    before: masks of a lower target, where the student they were trained with is pruned further. They are where these start, the target rises from
    theirs, and no steps leave the student whole.
    All ranks hold the same: the start and every draw are functions of (seed, step).
    """

    def __init__(
        self,
        prunable: Prunable,
        settings: SparsitySettings,
        *,
        target: float,
        steps: int,
        seed: int,
        removed: Removed | None = None,
        head_share: float | None = None,
        before: Masks | None = None,
    ) -> None:
        super().__init__()
        self.removed = removed or prunable.sparsity
        self.prunable, self.settings, self.target, self.seed = prunable, settings, target, seed
        self.start = 0 if before else round(settings.prepruning_ratio * steps)
        generator = torch.Generator().manual_seed(seed)
        self.units = nn.ModuleDict(
            {
                unit: HardConcrete(prunable.shapes[unit], initial=INITIAL[unit], scalar=unit in GATES, generator=generator)
                for unit in INITIAL
                if unit in settings.units
            }
        )
        if before:
            self.units.load_state_dict(before.units.state_dict())
        self.parts = parts(prunable, self.removed, target, settings.units, head_share)
        warmup, penalty = round(settings.warmup_ratio * steps), PENALTY * len(self.parts)
        self.hold = self.start + warmup
        """The step from which the target is at its full."""
        starts = {name: before.parts[name].target if before else part.dense for name, part in self.parts.items()}
        self.lagrangians = nn.ModuleDict({name: Lagrangian(part.target, warmup, starts[name], penalty) for name, part in self.parts.items()})
        self._step = 0

    @property
    def scores(self) -> dict[str, Tensor]:
        """log alpha by unit: what is higher is worth more."""
        return {unit: mask.log_alpha.detach() for unit, mask in self._each()}

    def worth(self) -> dict[str, Tensor]:
        """Of heads and neurons how open they are, and their layer with them; a trace where they are closed, for they may cost nothing."""
        return within_layers({unit: mask.openness().detach().clamp(min=TRACE) for unit, mask in self._each()})

    def soft(self) -> dict[str, Tensor]:
        """By unit the values of masks that are kept, whichever these are."""
        return {unit: mask.soft() for unit, mask in self._each()}

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam without decay or schedule; it descends on the masks and ascends on the multipliers."""
        gates = [parameter for unit, mask in self._each() if unit in GATES for parameter in mask.parameters()]
        units = [parameter for unit, mask in self._each() if unit not in GATES for parameter in mask.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": units},
            {"params": gates, "lr": self.settings.gate_lr_ratio * self.settings.mask_lr},
            {"params": list(self.lagrangians.parameters()), "maximize": True},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]], lr=self.settings.mask_lr)

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
            return torch.zeros((), device=next(self.lagrangians.parameters()).device)
        open_ = {unit: mask.openness() for unit, mask in self._each()}
        return torch.stack([held(self.parts[name].removed(open_), self._step - self.start) for name, held in self._constraints()]).sum()

    def after_step(self, step: int) -> dict[str, float]:
        """Clamp log alpha; what to log: also which layers are alive, and how many units in those."""
        for _, mask in self._each():
            mask.clamp_()
        with torch.no_grad():
            masks = self.deterministic()
            values = {"expected_sparsity": self.expected_sparsity(), "realised_sparsity": self.realised_sparsity(masks), **self._counts(masks)}
            for name, held in self._constraints():
                suffix = f"_{name}" * (len(self.parts) > 1)
                values |= {f"lambda_1{suffix}": held.multipliers[0], f"lambda_2{suffix}": held.multipliers[1]}
            numbers = torch.stack([value.float() for value in values.values()]).tolist()  # one wait for the device
        kept = sum(1 - held.target_at(step - self.start) for _, held in self._constraints())
        return {**dict(zip(values, numbers, strict=True)), "target_sparsity": round(1 - kept, 9)}

    def expected_sparsity(self) -> Tensor:
        """What the constraint holds: of `HardConcrete.openness`, with which masks at their limits count as the zeros and ones they become."""
        return self.removed({unit: mask.openness() for unit, mask in self._each()})

    def realised_sparsity(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Of deterministic masks: what removing their zeros removes."""
        return realised(self.removed, masks)

    def deterministic(self, shifts: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """The masks of evaluation by unit. shifts: by unit, added to log alpha where zeros are counted."""
        return {unit: mask.deterministic((shifts or {}).get(unit, 0.0)) for unit, mask in self._each()}

    def settle(self, rounded: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The masks to remove by, and the shifts of log alpha that bring what they remove to the target.

        The expected sparsity ends near the target, not on it, and the evaluation rule leaves of every unit a few, whatever its masks. So zeros are
        counted at log alpha plus one number for all units, then plus one more for each unit, from the coarsest to the finest, each found by
        bisection: of heads for their own target, where they have one. Which units of a layer go first, and the values of those kept, stay as trained.
        Something is always left.
        rounded: what becomes of masks before they are used.
        """

        def gone(shifts: Mapping[str, float], removed: Removed) -> tuple[float, bool]:
            found = rounded(self.deterministic(shifts))
            return realised(removed, found).item(), realised(self.prunable.sparsity, found).item() == 1

        units = [unit for unit, _ in self._each()]
        shifts = dict.fromkeys(units, 0.0)
        whole = Part(self.removed, 0.0, self.target)
        for shifted in (units, *([unit] for unit in units if unit not in GATES)):
            part = self.parts.get("heads", whole) if shifted == ["heads"] else whole
            low, high = -20.0, 20.0
            candidates = []
            for _ in range(40):
                middle = (low + high) / 2
                trial = {unit: shifts[unit] + (middle if unit in shifted else 0.0) for unit in units}
                sparsity, empty = gone(trial, part.removed)
                candidates.append((empty, abs(sparsity - part.target), trial))
                low, high = (middle, high) if sparsity > part.target else (low, middle)
            shifts = min(candidates, key=lambda candidate: candidate[:2])[2]
        return rounded(self.deterministic(shifts)), shifts

    def _counts(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layers = alive(masks, self.prunable)
        counts = {f"{layer}_alive": living.sum() for layer, living in layers.items()}
        counts |= {f"{layer}_alive_{number}": lives for layer, living in layers.items() for number, lives in enumerate(living, start=1)}
        for layer, fine in FINE.items():
            if fine in masks:
                counts[f"{fine}_alive"] = ((masks[fine] > 0) & layers[layer][:, None]).sum()
        return counts | ({"hidden_alive": (masks["hidden"] > 0).sum()} if "hidden" in masks else {})

    def _constraints(self) -> list[tuple[str, Lagrangian]]:
        return list(self.lagrangians.items())  # type: ignore[arg-type]

    def _each(self) -> list[tuple[str, HardConcrete]]:
        return list(self.units.items())  # type: ignore[arg-type] # in the order of INITIAL


def alive(masks: Mapping[str, Tensor], prunable: Prunable) -> dict[str, Tensor]:
    """Which layers have attention, and which feed-forward: bool [layers] each. The official code asks a layer's own mask alone, also where all units
    in it are dead."""
    device = next(iter(masks.values())).device
    found = {}
    for layer, fine in FINE.items():
        living = torch.ones(prunable.layers, dtype=torch.bool, device=device)
        if layer in masks:
            living = living & (masks[layer] != 0)
        if fine in masks:
            living = living & (masks[fine] != 0).any(-1)
        found[layer] = living
    return found
