"""How much of the encoder the masks remove, and the constraint that takes them to a target (CoFi, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineConfig

FINE = {"attention": "heads", "feedforward": "neurons"}
"""By kind of layer the units in it."""

Removed = Callable[[Mapping[str, Tensor]], Tensor]
"""The share that is gone where units are kept with these probabilities: `Prunable.sparsity` of parameters, `latency.Table.saved` of time."""


def realised(removed: Removed, masks: Mapping[str, Tensor]) -> Tensor:
    """The share that is gone without what these masks close: whatever its value, a mask that is not 0 keeps its unit whole."""
    return removed({unit: (mask > 0).float() for unit, mask in masks.items()})


def within_layers(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of heads and neurons their values, times their layers' where these are known."""
    return {fine: values[fine] * values[layer][:, None] if layer in values else values[fine] for layer, fine in FINE.items() if fine in values}


@dataclass(frozen=True)
class Prunable:
    """Parameters of the encoder that masks can remove: matrices and biases of attention and feed-forward blocks.

    Embeddings, LayerNorms, pooler and classifier do not count. The biases of a feed-forward block are counted as 5 d, and
    a neuron's share is rounded down, as in the official code, so that figures compare with the published ones.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int

    @classmethod
    def of(cls, config: TrimlineConfig) -> Prunable:
        """Raises UserError for a model whose layers are of different shapes: it has been pruned before."""
        heads, neurons = set(config.heads_per_layer), set(config.ffn_per_layer)
        if len(heads) > 1 or len(neurons) > 1 or config.heads_per_layer[0] * config.head_dim != config.hidden_size:
            raise UserError(
                f"{config.name_or_path}: its layers have {config.heads_per_layer} heads and {config.ffn_per_layer} neurons, so it was pruned before;"
                " prune takes a model whose layers are whole and alike: start from the one before pruning"
            )
        return cls(len(config.heads_per_layer), config.hidden_size, config.heads_per_layer[0], config.ffn_per_layer[0])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the masks of each unit, coarse units first."""
        each, layers = (self.layers,), self.layers
        return {"attention": each, "feedforward": each, "hidden": (self.hidden,), "heads": (layers, self.heads), "neurons": (layers, self.ffn)}

    @property
    def head(self) -> int:
        """Parameters of one attention head."""
        return (4 * self.hidden**2 + 4 * self.hidden) // self.heads

    @property
    def neuron(self) -> int:
        """Parameters of one feed-forward neuron."""
        return self.feedforward // self.ffn

    @property
    def feedforward(self) -> int:
        """Parameters of one feed-forward block."""
        return 2 * self.hidden * self.ffn + 5 * self.hidden

    @property
    def total(self) -> int:
        """M: all that could be removed."""
        return self.layers * (self.heads * self.head + self.feedforward)

    def sparsity(self, keep: Mapping[str, Tensor]) -> Tensor:
        """Share of `total` removed: expected, from keep probabilities, or realised, from zeros and ones.

        keep: by unit, of `shapes`; a unit that is absent is kept whole. A head or neuron counts where its layer is kept too. With `hidden` a
        dimension's share is P_head / d of a head and 2 of a neuron, the biases left out, as in the official code.
        """
        heads, neurons = self._kept("heads", "attention", keep), self._kept("neurons", "feedforward", keep)
        size: Tensor | float
        if "hidden" in keep:
            size = (heads * (self.head / self.hidden) + neurons * 2) * keep["hidden"].sum()
        else:
            size = heads * self.head + neurons * (self.neuron if "neurons" in keep else self.feedforward / self.ffn)
        return 1 - torch.as_tensor(size) / self.total

    def _kept(self, fine: str, layer: str, keep: Mapping[str, Tensor]) -> Tensor | float:
        """How many of the fine units are kept, over all layers."""
        layers, units = self.shapes[fine]
        if fine not in keep:
            return units * (keep[layer].sum() if layer in keep else float(layers))
        return (keep[fine] * keep[layer][:, None]).sum() if layer in keep else keep[fine].sum()


@dataclass(frozen=True)
class Part:
    """What one constraint holds: the share `removed` of the encoder, were this part all there is of it.

    It is `dense` where the part is whole, and is to be `target`.
    """

    removed: Removed
    dense: float
    target: float


def parts(prunable: Prunable, removed: Removed, target: float, units: Collection[str], head_share: float | None) -> dict[str, Part]:
    """What is held, by name: `all` to the target, as in the paper; or, with a head_share, `heads` and `neurons`, each with its layers, apart.

    head_share: of the 1 - target that is kept, attention's. It gets no more than it has, nor do neurons. Without masks on both units, all is one.
    """
    if head_share is None or not {"heads", "neurons"} <= set(units):
        return {"all": Part(removed, 0.0, target)}

    def without(unit: str) -> Removed:
        def gone(keep: Mapping[str, Tensor]) -> Tensor:
            return removed({**keep, unit: torch.zeros(prunable.shapes[unit], device=next(iter(keep.values())).device)})

        return gone

    alone = {"heads": without("neurons"), "neurons": without("heads")}
    dense = {unit: gone({unit: torch.ones(prunable.shapes[unit])}).item() for unit, gone in alone.items()}
    heads = min(max(head_share * (1 - target), dense["neurons"] - target), 1 - dense["heads"])
    kept = {"heads": heads, "neurons": 1 - target - heads}
    return {unit: Part(gone, dense[unit], 1 - kept[unit]) for unit, gone in alone.items()}


PENALTY = 300.0
"""The start of lambda_2. The official 0 lets the target run ahead for hundreds of steps; the multipliers then wind up and overshoot it. A stiff term
leaves lambda_1 little to do: in simulated prunings of 400 steps to 95 % the masks end within 3 points of the target, 100 leaves them 10 short."""


class Lagrangian(nn.Module):
    """lambda_1 (s - t) + lambda_2 (s - t)^2, minimised over the masks and maximised over the multipliers.

    The target t rises linearly from `start` to `target` over `warmup` steps of pruning. penalty: where lambda_2 starts; several constraints need it
    as many times as high, since each is but a part as far from its target.
    """

    def __init__(self, target: float, warmup: int, start: float = 0.0, penalty: float = PENALTY) -> None:
        super().__init__()
        self.target, self.warmup, self.start = target, warmup, start
        self.multipliers = nn.Parameter(torch.tensor([0.0, penalty]))

    def target_at(self, step: int) -> float:
        """t, `step` steps after pruning began."""
        risen = min(1.0, max(step, 0) / self.warmup) if self.warmup else 1.0
        return self.start + (self.target - self.start) * risen

    def forward(self, sparsity: Tensor, step: int) -> Tensor:
        excess = sparsity - self.target_at(step)
        return self.multipliers[0] * excess + self.multipliers[1] * excess**2
