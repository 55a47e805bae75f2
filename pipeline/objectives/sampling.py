"""Drawing tokens from a softmax over the vocabulary, a block of positions at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_STREAM = 3
"""Streams of `draws.uniform` that sampling uses begin here, two a token; those before are the masking's."""


@torch.no_grad()
def sample(hidden: Tensor, weight: Tensor, bias: Tensor, uniform: Tensor, *, temperature: float = 1.0, chunk: int = 512) -> Tensor:
    """Tokens int64 [N, k] drawn with replacement from softmax((hidden @ weight.T + bias) / temperature).

    hidden [N, h], weight [V, h], bias [V], uniform fp32 [N, 2 k] in [0, 1): two independent numbers a token. chunk: rows whose logits are held.

    The inverse of the distribution function, in two levels: a block of about sqrt(V) tokens by the blocks' sums, then a token of it by the block's
    own. So only the k blocks drawn are summed up token by token, in fp32 no rounding adds up over the vocabulary, and with a number of its own
    each level is as fine as it can be: a token of probability below 2^-24 can still be drawn. On a CPU this costs a third of the logits' product,
    a softmax and its cumulative sum as much as that product, exponential noise (Gumbel) five times as much.
    """
    vocabulary, narrow = len(weight), hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        narrow = torch.get_autocast_dtype(hidden.device.type)
    block = 2 ** math.ceil(math.log2(vocabulary) / 2)
    beyond = -vocabulary % block
    hidden = (hidden.float() / temperature).to(narrow)
    weight = F.pad(weight.to(narrow), (0, 0, 0, beyond))
    bias = F.pad(bias.float() / temperature, (0, beyond), value=-torch.inf)
    drawn = []
    for rows, numbers in zip(hidden.split(chunk), uniform.split(chunk), strict=True):
        first, second = numbers.chunk(2, dim=1)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(rows, weight).float().add_(bias)
        weights = logits.sub_(logits.amax(1, keepdim=True)).exp_().unflatten(1, (-1, block))
        chosen = _inverse(weights.sum(2).cumsum(1), first)
        within = weights.gather(1, chosen.unsqueeze(2).expand(-1, -1, block)).cumsum(2)
        drawn.append(chosen * block + _inverse(within, second.unsqueeze(2)).squeeze(2))
    return torch.cat(drawn).clamp_(max=vocabulary - 1)  # numbers too small for fp32 may round to the end of the last block


def _inverse(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """cumulative [..., n] sums of weights, uniform [..., m] -> int64 [..., m]: where each share of the whole is reached, never at a weight of 0."""
    return torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)
