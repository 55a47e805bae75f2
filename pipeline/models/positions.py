"""How a transformer knows where a token stands: one class a scheme.

A scheme may act in up to three places of the model: added to the token embeddings, added to the attention scores (computed
once a forward pass and shared by all layers), or turning queries and keys. Each place is a method that the model calls;
`embed` is the one that absolute positions need. Depends on torch alone, because it travels with exported models.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AbsolutePositions(nn.Module):
    """A learned vector for each position, added to the token embeddings (Devlin et al. 2019)."""

    bounded = True
    """Whether inputs longer than `max_length` fail."""

    def __init__(self, hidden_size: int, max_length: int):
        super().__init__()
        self.table = nn.Embedding(max_length, hidden_size)

    def embed(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        """tokens [B, L, d] with their positions added; `position_ids` [B, L] default to 0, 1, ... L - 1.

        Raises ValueError when there are more tokens than positions.
        """
        length = tokens.shape[1]
        if length > self.table.num_embeddings:
            raise ValueError(f"the input has {length} tokens, the model has positions for {self.table.num_embeddings}")
        if position_ids is None:
            position_ids = torch.arange(length, device=tokens.device)
        return tokens + self.table(position_ids)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the position at d / 2 wavelengths from 2 pi to 10000 * 2 pi, added to the token embeddings; no parameters, any length.

    Vaswani et al. 2017, section 3.5, laid out as in fairseq: the sines first, then the cosines.
    """

    bounded = False

    def __init__(self, hidden_size: int, max_length: int):
        super().__init__()
        self.hidden_size = hidden_size

    def embed(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        """tokens [B, L, d] with their positions added; `position_ids` [B, L] default to 0, 1, ... L - 1."""
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)
        half = self.hidden_size // 2
        frequencies = torch.exp(torch.arange(half, device=tokens.device) * (-math.log(10000) / max(half - 1, 1)))
        angles = position_ids[..., None].float() * frequencies
        waves = F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, self.hidden_size % 2))
        return tokens + waves.to(tokens.dtype)


SCHEMES: dict[str, type[AbsolutePositions] | type[SinusoidalPositions]] = {"absolute": AbsolutePositions, "sinusoidal": SinusoidalPositions}
"""Name in a recipe (`model.positions`) -> class."""


def positions_within(document_ids: Tensor) -> Tensor:
    """int64 [B, L]: how many tokens of its document stand before each token. document_ids [B, L], a document's tokens together."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    return places - (places * begins).cummax(dim=1).values
