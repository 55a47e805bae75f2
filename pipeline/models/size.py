"""How large a model is and how much it computes."""

from __future__ import annotations

from torch import nn

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
    Chowdhery et al. 2022, appendix B). predicted: share of positions that reach the vocabulary projection.
    """
    d = config.hidden_size
    units = [4 * d * heads * config.head_dim + 2 * d * neurons for heads, neurons in zip(config.heads_per_layer, config.ffn_per_layer, strict=True)]
    scores = 2 * length * config.head_dim * sum(config.heads_per_layer)
    transform = d * d if config.kind == "encoder" else 0
    return 2.0 * (sum(units) + scores + predicted * (transform + d * config.vocab_size))


def training_flops_per_row(config: TrimlineConfig, length: int, predicted: float = 1.0) -> float:
    """Forward and backward (twice the forward) of one row; recomputed activations do not count."""
    return 3.0 * length * flops_per_token(config, length, predicted)
