"""How a transformer knows where a token stands: one class a scheme.

A scheme acts in up to three places of the model: added to the token embeddings (`embed`), added to the attention scores (`bias`, computed
once a forward pass and shared by all layers), or turning queries and keys (`rotation`). Depends on torch alone, because it travels with
exported models. Parameters are used through their modules' calls alone, which is where ZeRO-3 gathers them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKETS, MAX_DISTANCE = 32, 128
FROM_CLS, TO_CLS = 16, 32
"""Buckets of [CLS] looking at others, and of others looking at it: no distance has 16, and 32 is a row more (Ke et al. 2021, as in their code)."""


class Positions(nn.Module):
    """What the model asks of a scheme. Made from the model's configuration; here it acts nowhere."""

    kinds: tuple[str, ...] = ("encoder", "decoder")
    bounded = False
    """Whether inputs longer than `max_position_embeddings` fail."""
    terms = 1
    """How many products of head width a score is the sum of: queries times keys are scaled by 1 / sqrt(terms * head_dim)."""

    def __init__(self, config: Any):
        super().__init__()
        if config.kind not in self.kinds:
            raise ValueError(f"positions {config.positions} are for a model of kind {' or '.join(self.kinds)}; this one is of kind {config.kind}")

    def embed(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        """tokens [B, L, d] with their positions added; `position_ids` [B, L] default to 0, 1, ... L - 1."""
        return tokens

    def bias(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor | None:
        """fp32 [heads, L, L] or [B, heads, L, L], to add to the scores of queries (rows) and keys (columns); tokens [B, L, ...] say how many."""
        return None

    def rotation(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor | None:
        """What `rotate` turns queries and keys by; tokens [B, L, ...] say how many."""
        return None


class AbsolutePositions(Positions):
    """A learned vector for each position, added to the token embeddings (Devlin et al. 2019)."""

    bounded = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def embed(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        """Raises ValueError when there are more tokens than positions."""
        length = tokens.shape[1]
        if length > self.table.num_embeddings:
            raise ValueError(f"the input has {length} tokens, the model has positions for {self.table.num_embeddings}")
        if position_ids is None:
            position_ids = torch.arange(length, device=tokens.device)
        return tokens + self.table(position_ids)


class SinusoidalPositions(Positions):
    """Sines and cosines of the position at d / 2 wavelengths from 2 pi to 10000 * 2 pi, added to the token embeddings; no parameters, any length.

    Vaswani et al. 2017, section 3.5, laid out as in fairseq: the sines first, then the cosines.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.hidden_size = config.hidden_size

    def embed(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)
        half = self.hidden_size // 2
        frequencies = torch.exp(torch.arange(half, device=tokens.device) * (-math.log(10000) / max(half - 1, 1)))
        angles = position_ids[..., None].float() * frequencies
        waves = F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, self.hidden_size % 2))
        return tokens + waves.to(tokens.dtype)


class RotaryPositions(Positions):
    """Queries and keys turned by angles that grow with the position, so that scores know distances alone (Su et al. 2021); any length.

    Laid out as in GPT-NeoX: a pair is dimensions i and i + head_dim / 2, its angle position * 10000^(-2 i / head_dim).
    """

    def __init__(self, config: Any):
        super().__init__(config)
        if config.head_dim % 2:
            raise ValueError(f"positions rope turn pairs of dimensions; heads of {config.head_dim} have an odd one")
        self.head_dim = config.head_dim

    def rotation(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        """fp32 [2, 1 or B, 1, L, head_dim / 2]: cosines and sines."""
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
        frequencies = 10000 ** (torch.arange(0, self.head_dim, 2, device=tokens.device) / -self.head_dim)
        angles = (position_ids[..., None] * frequencies)[:, None]
        return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys [B, heads, L, head_dim], each pair of dimensions turned by its angle."""
    (cosine, sine), (first, second) = rotation, x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


class LinearBias(Positions):
    """ALiBi: each head lowers a score by the distance times a slope of its own (Press et al. 2022); no parameters, any length.

    In encoders the same to both sides, as in MosaicBERT (Portes et al. 2023). A distance is counted along the row, whatever `position_ids` say.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self.slopes = slopes(attention_heads(config))

    def bias(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        slope = torch.tensor(self.slopes, device=tokens.device)
        return slope[:, None, None] * -(places[None, :] - places[:, None]).abs()


def slopes(heads: int) -> list[float]:
    """ALiBi's 2^(-8 i / n) for n heads; where n is no power of two, those of the power below it and then every other one of the power above."""
    power = 2 ** int(math.log2(heads))
    return [2 ** (-8 * i / power) for i in range(1, power + 1)] + [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]


class RelativeBias(nn.Module):
    """T5's bias (Raffel et al. 2020): a learned scalar for each bucket of distances and each head. A distance is counted along the row.

    untie_cls: the row's first token, [CLS], has two scalars of its own, for looking at others and being looked at.
    """

    def __init__(self, heads: int, untie_cls: bool):
        super().__init__()
        self.untie_cls = untie_cls
        self.table = nn.Embedding(BUCKETS + untie_cls, heads)

    def forward(self, length: int, device: torch.device) -> Tensor:
        """fp32 [heads, length, length]."""
        buckets = relative_buckets(torch.arange(1 - length, length, device=device))
        scalars = self.table(torch.cat([buckets, buckets.new_tensor([FROM_CLS, TO_CLS] if self.untie_cls else [])])).float().T
        places = torch.arange(length, device=device)
        scores = scalars[:, places[None, :] - places[:, None] + length - 1]
        return _reset_cls(scores[:, 1:, 1:], scalars[:, -2], scalars[:, -1]) if self.untie_cls else scores


class AbsoluteRelativePositions(AbsolutePositions):
    """Absolute positions and T5's bias, shared by all layers: the BERT-R of Ke et al. 2021, table 1."""

    kinds = ("encoder",)

    def __init__(self, config: Any):
        super().__init__(config)
        self.relative = RelativeBias(attention_heads(config), untie_cls=False)

    def bias(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return self.relative(tokens.shape[1], tokens.device)


class UntiedPositions(Positions):
    """TUPE-A (Ke et al. 2021, equations 7, 10 and 11): positions meet positions through projections of their own, words meet words.

    A score is (x_i W_Q)(x_j W_K) / sqrt(2 d) + (p_i U_Q)(p_j U_K) / sqrt(2 d), d the width of a head. As in the authors' code p goes through a
    LayerNorm, U has biases, and [CLS], the first token of a row, has scores of two rows of its own at the head of p:
    theta_1 = p_0 U_Q U_K p_0 with every key, theta_2 = p_1 U_Q U_K p_1 with every query but itself.
    untie_cls = False is the paper's ablation, in which [CLS] is a position as any other.

    Positions beyond those learned are interpolated, so that a longer input is the learned span seen finer (Chen et al. 2023). Other documents of
    a row have no [CLS], so their positions begin at 1.
    """

    kinds = ("encoder",)
    terms = 2

    def __init__(self, config: Any):
        super().__init__(config)
        self.head_dim, self.untie_cls = config.head_dim, config.untie_cls
        width = attention_heads(config) * config.head_dim
        self.table = nn.Embedding(config.max_position_embeddings + self.untie_cls, full_width(config))
        self.norm = nn.LayerNorm(full_width(config), config.layer_norm_eps)
        self.query = nn.Linear(full_width(config), width)
        self.key = nn.Linear(full_width(config), width)

    def bias(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        length = tokens.shape[1]
        with torch.autocast(tokens.device.type, enabled=False):
            rows = torch.arange(min(length + self.untie_cls, self.table.num_embeddings), device=tokens.device)
            positions = self.norm(self.table(rows))
            query, key = self.query(positions).float() / math.sqrt(self.terms * self.head_dim), self.key(positions).float()
            if not self.untie_cls:
                return self._scores(*(_at(_stretched(side, length), position_ids) for side in (query, key)))
            from_cls, to_cls = (query[:2] * key[:2]).unflatten(1, (-1, self.head_dim)).sum(dim=2)
            if position_ids is not None:
                later = (position_ids == 0).cumsum(dim=1) > 1  # of another document than the first
                position_ids = (position_ids + later)[:, 1:] - 1
            scores = self._scores(*(_at(_stretched(side[2:], length - 1), position_ids) for side in (query, key)))
            return _reset_cls(scores, from_cls, to_cls)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[.., L, width] each -> [.., heads, L, L]."""
        query, key = (side.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3) for side in (query, key))
        return query @ key.transpose(-1, -2)


class UntiedRelativePositions(UntiedPositions):
    """TUPE-R: TUPE-A and T5's bias, which is not scaled, with scalars of its own for [CLS]."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.relative = RelativeBias(attention_heads(config), config.untie_cls)

    def bias(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return super().bias(tokens, position_ids) + self.relative(tokens.shape[1], tokens.device)


SCHEMES: dict[str, type[Positions]] = {
    "absolute": AbsolutePositions,
    "sinusoidal": SinusoidalPositions,
    "absolute-relative": AbsoluteRelativePositions,
    "tupe-absolute": UntiedPositions,
    "tupe-relative": UntiedRelativePositions,
    "rope": RotaryPositions,
    "alibi": LinearBias,
}
"""Name in a recipe (`model.positions`) -> class."""


def attention_heads(config: Any) -> int:
    """Heads of a layer before any pruning: those that a bias is made for."""
    return full_width(config) // config.head_dim


def full_width(config: Any) -> int:
    """Of the residual stream, before any pruning."""
    return config.full_hidden_size or config.hidden_size


def relative_buckets(distance: Tensor, *, num_buckets: int = BUCKETS, max_distance: int = MAX_DISTANCE) -> Tensor:
    """T5's bucket of each distance, key minus query, int64 in [0, num_buckets); any shape.

    Half of the buckets are for keys to the right. Of each half, one half are distances of their own and the others widen by equal ratios up
    to `max_distance`, beyond which all share the last.
    """
    half = num_buckets // 2
    exact = half // 2
    far = distance.abs()
    ratio = torch.log(far.clamp(min=exact).double() / exact) / math.log(max_distance / exact)
    wide = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance > 0, half, 0) + torch.where(far < exact, far, wide)


def positions_within(document_ids: Tensor) -> Tensor:
    """int64 [B, L]: how many tokens of its document stand before each token. document_ids [B, L], a document's tokens together."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    return places - (places * begins).cummax(dim=1).values


def _reset_cls(scores: Tensor, from_cls: Tensor, to_cls: Tensor) -> Tensor:
    """Equation 10: scores [.., heads, L - 1, L - 1] of the other tokens, and before them a row of `from_cls` [heads] and a column of `to_cls`."""
    length = scores.shape[-1] + 1
    column = to_cls[:, None, None].expand(*scores.shape[:-1], 1)
    row = from_cls[:, None, None].expand(*scores.shape[:-2], 1, length)
    return torch.cat([row, torch.cat([column, scores], dim=-1)], dim=-2)


def _at(vectors: Tensor, position_ids: Tensor | None) -> Tensor:
    """The rows of vectors [L, width] at `position_ids` [B, L], or as they are."""
    return vectors if position_ids is None else F.embedding(position_ids, vectors)


def _stretched(vectors: Tensor, length: int) -> Tensor:
    """vectors [positions, width] interpolated to `length` rows where there are fewer."""
    if length <= len(vectors):
        return vectors
    return F.interpolate(vectors.T[None], size=length, mode="linear", align_corners=True)[0].T
