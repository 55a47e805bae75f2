"""How a transformer knows where a token stands: one class a scheme.

A scheme may act in up to three places of the model: added to the token embeddings, added to the attention scores (computed
once a forward pass and shared by all layers), or turning queries and keys. Each place is a method that the model calls;
`embed` is the one that absolute positions need. Depends on torch alone, because it travels with exported models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AbsolutePositions(nn.Module):
    """A learned vector for each position, added to the token embeddings (Devlin et al. 2019)."""

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


SCHEMES = {"absolute": AbsolutePositions}
"""Name in a recipe (`model.positions`) -> class."""
