"""Hard-concrete masks (Louizos et al. 2018), with the constants and the evaluation rule of CoFi (Xia et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

TEMPERATURE = 2 / 3
"""beta: how close a sample is to a step function."""
GAMMA, ZETA = -0.1, 1.1
"""The sample is stretched to (gamma, zeta) before clipping to [0, 1], so that 0 and 1 have mass."""
EPSILON = 1e-6
SHARPNESS = 0.8
"""Of the soft value of a kept mask in evaluation (`magical_number` of the official code)."""
LIMIT = math.log(100)
"""log alpha stays within [-LIMIT, LIMIT]."""
INITIAL = 10.0
"""The official start of log alpha; the first clamp takes it to LIMIT."""


class HardConcrete(nn.Module):
    """Masks in [0, 1], one `log_alpha` (fp32) an element.

    shape: of the masks; the evaluation rule counts along the last dimension.
    initial: mean of the initial log alpha, drawn from N(initial, 0.01^2) with `generator`.
    scalar: every mask decides for itself (kept where its keep probability is at least 0.5), as for whole layers.
    """

    def __init__(
        self, shape: int | Sequence[int], *, initial: float = INITIAL, scalar: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        self.scalar = scalar
        self.log_alpha = nn.Parameter(initial + 0.01 * torch.randn(size, generator=generator, dtype=torch.float32))

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """One random mask, differentiable in log alpha where it is not clipped.

        noise: uniform draws in [0, 1] of the masks' shape; drawn here when None.
        """
        if noise is None:
            noise = torch.rand_like(self.log_alpha)
        noise = noise.clamp(EPSILON, 1 - EPSILON)
        concrete = torch.sigmoid((noise.log() - (1 - noise).log() + self.log_alpha) / TEMPERATURE)
        return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def keep_probability(self, shift: float = 0.0) -> Tensor:
        """P(mask > 0), of the masks' shape. shift: added to log alpha."""
        zero = torch.sigmoid(TEMPERATURE * math.log(-GAMMA / ZETA) - (self.log_alpha + shift))
        return 1 - zero.clamp(EPSILON, 1 - EPSILON)

    def openness(self) -> Tensor:
        """The keep probability, stretched so that it is 0 and 1 where log alpha is at its limits; there it is .047 and .998 itself."""
        least, most = (_keep_probability(limit) for limit in (-LIMIT, LIMIT))
        return (self.keep_probability() - least) / (most - least)

    @torch.no_grad()
    def soft(self) -> Tensor:
        """The value in evaluation of a mask that is kept."""
        return torch.sigmoid(SHARPNESS * self.log_alpha / TEMPERATURE)

    @torch.no_grad()
    def deterministic(self, shift: float = 0.0) -> Tensor:
        """The mask of evaluation: along the last dimension as many zeros as are expected, the smallest; the others stay soft, below 1.

        shift: added to log alpha where zeros are counted; the soft values are those of log alpha itself.
        """
        soft = self.soft()
        keep = self.keep_probability(shift)
        if self.scalar:
            return torch.where(keep < 0.5, 0.0, soft)
        zeros = (keep.shape[-1] - keep.sum(-1, keepdim=True)).round()  # half to even
        rank = self.log_alpha.argsort(dim=-1, stable=True).argsort(dim=-1)
        return torch.where(rank < zeros, 0.0, soft)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep log alpha within its limits: after every optimiser step."""
        self.log_alpha.clamp_(-LIMIT, LIMIT)


def _keep_probability(log_alpha: float) -> float:
    return 1 / (1 + (-GAMMA / ZETA) ** TEMPERATURE * math.exp(-log_alpha))
