"""The `model` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting


class ModelSettings(Settings):
    """The transformer to build, or (`from`) the checkpoint that stands in for one."""

    from_: str | None = setting(None, "Directory of a Hugging Face checkpoint to start from; the shape below is then its own.", alias="from")
    trust_remote_code: bool = setting(False, "Run modelling code that lies in the `from` directory.")
    kind: Literal["encoder", "decoder"] = setting("encoder", "encoder: sees both sides (mlm); decoder: sees the past (causal).")
    layers: int = setting(4, "Transformer blocks.", ge=1)
    hidden: int = setting(256, "Width of the residual stream.", unit="dimensions", ge=8)
    heads: int = setting(4, "Attention heads.", ge=1)
    ffn: int = setting(1024, "Width of the feed-forward block.", unit="neurons", ge=8)
    positions: Literal["absolute"] = setting("absolute", "Position scheme.")
    norm: Literal["post", "pre"] = setting("post", "LayerNorm after (BERT) or before (GPT-2) each sub-layer.")
    dropout: float = setting(0.1, "Dropout on embeddings, attention and sub-layer outputs.", ge=0, lt=1)
    max_length: int = setting(512, "Longest input.", unit="tokens", ge=8)
    init_std: float = setting(0.02, "Standard deviation of initial weights.", gt=0)

    @model_validator(mode="after")
    def _divides(self) -> ModelSettings:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        return self
