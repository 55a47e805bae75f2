"""How large a model is and how much it computes."""

from __future__ import annotations

import math

from torch import nn

from pipeline.models.adaptive import bands
from pipeline.models.modeling_trimline import TrimlineConfig


def parameters(model: nn.Module) -> int:
    """All parameters, a tied matrix once."""
    return sum(parameter.numel() for parameter in model.parameters())


def block_parameters(config: TrimlineConfig) -> int:
    """Weights and biases of the attention and feed-forward blocks that are there: what pruning can remove.

    Embeddings, LayerNorms, pooler and heads do not count.
    """
    d, width = config.hidden_size, config.head_dim
    attention = sum(heads * width * (4 * d + 3) + d for heads in config.heads_per_layer if heads)
    feed_forward = sum(neurons * (2 * d + 1) + d for neurons in config.ffn_per_layer if neurons)
    return attention + feed_forward


def flops_per_token(config: TrimlineConfig, length: int, predicted: float = 1.0) -> float:
    """Floating-point operations of a forward pass through a language model for each token of a row of `length` tokens.

    Matrix products only, a multiply-add counting two. Attention scores count in full, a decoder's too (the convention of
    Chowdhery et al. 2022, appendix B). predicted: share of positions that reach the vocabulary projection; an adaptive softmax is as
    a loss computes it, a tail for the targets in it alone. What positions compute once a forward pass for all its rows does not count: TUPE's
    1.6 billion at BERT-base's shape and 512 tokens are 0.2 % of the forward pass of 8 rows.
    """
    d = config.hidden_size
    units = [4 * d * heads * config.head_dim + 2 * d * neurons for heads, neurons in zip(config.heads_per_layer, config.ffn_per_layer, strict=True)]
    scores = 2 * length * config.head_dim * sum(config.heads_per_layer)
    if config.adaptive is not None:
        entering, leaving = _adaptive_products(config, config.adaptive["cutoffs"], config.adaptive["factor"])
    else:
        entering, leaving = 0.0, d * config.vocab_size + (d * d if config.kind == "encoder" else 0)
    return 2.0 * (entering + sum(units) + scores + predicted * leaving)


def _adaptive_products(config: TrimlineConfig, cutoffs: list[int], factor: int) -> tuple[float, float]:
    """Multiply-adds of an average token in the adaptive embedding and in the softmax, by Zipf's law: the word of rank r is 1 / r as frequent."""
    d, vocabulary = config.hidden_size, config.vocab_size
    parts = bands(d, vocabulary, cutoffs, factor)
    shares = [math.log((end + 1) / (start + 1)) / math.log(vocabulary + 1) for start, end, _ in parts]
    entering = sum(share * d * width for share, (_, _, width) in zip(shares, parts, strict=True))
    tails = sum(share * width * (d + end - start) for share, (start, end, width) in list(zip(shares, parts, strict=True))[1:])
    return entering, d * (parts[0][1] + len(parts) - 1) + tails


def training_flops_per_row(config: TrimlineConfig, length: int, predicted: float = 1.0) -> float:
    """Forward and backward (twice the forward) of one row; recomputed activations do not count."""
    return 3.0 * length * flops_per_token(config, length, predicted)
