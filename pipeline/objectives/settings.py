"""The `pretrain.objective` section of a recipe: one settings class an objective, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.settings import Settings, setting


class ObjectiveSettings(Settings):
    """What every objective declares before anything runs."""

    needs: ClassVar[str] = "segments"
    """What the plan must provide: `segments`, or `groups` of two or more."""
    kind: ClassVar[str]
    """The model it trains: `encoder` or `decoder`."""


class MlmSettings(ObjectiveSettings):
    """Masked language modelling (Devlin et al. 2019)."""

    kind: ClassVar[str] = "encoder"
    name: Literal["mlm"] = "mlm"
    mask_rate: float = setting(0.15, "Share of tokens to predict.", gt=0, lt=1)
    mask_token_rate: float = setting(0.8, "Share of those replaced by the mask token.", ge=0, le=1)
    random_token_rate: float = setting(0.1, "Share of those replaced by a random token; the rest stay.", ge=0, le=1)


class CausalSettings(ObjectiveSettings):
    """Next-token prediction."""

    kind: ClassVar[str] = "decoder"
    name: Literal["causal"] = "causal"


AnyObjective = Annotated[MlmSettings | CausalSettings, Field(discriminator="name")]
