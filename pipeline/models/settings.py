"""The `model` section of a recipe."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting


class AdaptiveSettings(Settings):
    """Adaptive input embeddings and softmax (Baevski and Auli 2019), on token ids that fall in frequency."""

    cutoffs: tuple[int, ...] = setting(..., "First token id of each band after the first; [] makes one band.", unit="tokens")
    factor: int = setting(4, "How many times narrower each band is than the one before it.", ge=1)
    tie_projections: bool = setting(True, "The softmax's tails use the input's projections; their tables are the input's always.")
    dropout: float = setting(0.0, "Dropout on the hidden state before the softmax, and on its projection to a tail.", ge=0, lt=1)

    @model_validator(mode="after")
    def _rise(self) -> AdaptiveSettings:
        if any(low >= high for low, high in pairwise((0, *self.cutoffs))):
            raise ValueError(f"cutoffs {list(self.cutoffs)} do not rise from above 0")
        return self


FOR_ENCODERS = ("absolute-relative", "tupe-absolute", "tupe-relative")
"""Positions that say nothing of a future that is hidden."""


class ModelSettings(Settings):
    """The transformer to build, or (`from`) the checkpoint that stands in for one."""

    from_: str | None = setting(None, "Directory of a Hugging Face checkpoint to start from; the shape below is then its own.", alias="from")
    trust_remote_code: bool = setting(False, "Run modelling code that lies in the `from` directory.")
    memory_module: str | None = setting(
        None, "Module of a `from` model whose input is the memory state, such as model.layers.11.mlp; default: the last layer's feed-forward block."
    )
    kind: Literal["encoder", "decoder"] = setting("encoder", "encoder: sees both sides (mlm); decoder: sees the past (causal).")
    layers: int = setting(4, "Transformer blocks.", ge=1)
    hidden: int = setting(256, "Width of the residual stream.", unit="dimensions", ge=8)
    heads: int = setting(4, "Attention heads.", ge=1)
    ffn: int = setting(1024, "Width of the feed-forward block.", unit="neurons", ge=8)
    positions: Literal["absolute", "sinusoidal", "absolute-relative", "tupe-absolute", "tupe-relative", "rope", "alibi"] = setting(
        "absolute",
        "absolute: a learned vector each; sinusoidal: fixed, any length; absolute-relative: absolute and T5's bias; tupe-absolute: TUPE, positions "
        "untied from words; tupe-relative: the same and T5's bias; rope: rotations, any length; alibi: a slope a head, any length.",
    )
    untie_cls: bool = setting(True, "TUPE scores [cls] apart from positions; false is its paper's ablation.")
    norm: Literal["post", "pre"] = setting("post", "LayerNorm after (BERT) or before (GPT-2) each sub-layer.")
    final_norm: bool = setting(True, "A LayerNorm after the last layer of a pre-norm model.")
    activation: Literal["gelu", "relu"] = setting("gelu", "Activation of the feed-forward block.")
    dropout: float = setting(0.1, "Dropout on embeddings, attention and sub-layer outputs.", ge=0, lt=1)
    attention_dropout: float | None = setting(None, "Dropout on attention probabilities; default: as dropout.", ge=0, lt=1)
    activation_dropout: float = setting(0.0, "Dropout on what the activation gives.", ge=0, lt=1)
    scale_embeddings: bool = setting(False, "Token embeddings times the square root of hidden, before positions are added.")
    unpadded: bool = setting(False, "All but attention runs on real tokens alone: faster where batches hold much padding, the same results.")
    adaptive: AdaptiveSettings | None = setting(None, "Tables that narrow with falling frequency, for very large vocabularies of decoders.")
    max_length: int = setting(512, "Longest input.", unit="tokens", ge=8)
    init_std: float = setting(0.02, "Standard deviation of initial weights.", gt=0)

    @property
    def bounded(self) -> bool:
        """Whether inputs longer than `max_length` fail."""
        return self.positions in ("absolute", "absolute-relative")

    @model_validator(mode="after")
    def _divides(self) -> ModelSettings:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if not self.final_norm and self.norm == "post":
            raise ValueError("final_norm: false is for norm: pre; a post-norm model has no such LayerNorm")
        if self.kind == "decoder" and self.positions in FOR_ENCODERS:
            raise ValueError(f"positions {self.positions} are for kind: encoder; a decoder takes absolute, sinusoidal, rope or alibi")
        if self.positions == "rope" and self.hidden // self.heads % 2:
            raise ValueError(f"positions rope turn pairs of dimensions; heads of hidden {self.hidden} / {self.heads} have an odd one")
        if not self.untie_cls and not self.positions.startswith("tupe"):
            raise ValueError(
                f"untie_cls: false is for tupe-absolute and tupe-relative; positions {self.positions} do not set [cls] apart: leave it out"
            )
        if self.adaptive and self.kind == "encoder":
            raise ValueError("adaptive is for kind: decoder; leave it out")
        if self.adaptive and self.hidden < self.adaptive.factor ** len(self.adaptive.cutoffs):
            raise ValueError(f"adaptive.factor {self.adaptive.factor} leaves the last band no width: hidden is {self.hidden}; set a smaller factor")
        return self
