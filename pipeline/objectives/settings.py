"""The `pretrain.objective` section of a recipe: one settings class an objective, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pipeline.settings import Settings, setting


class ObjectiveSettings(Settings):
    """What every objective declares before anything runs."""

    needs: ClassVar[str] = "segments"
    """What the plan must provide: `segments`, or `groups` of two or more."""
    groups: ClassVar[tuple[str, ...]] = ("random", "consecutive", "bm25")
    """Of which kinds the plan's groups may be."""
    needs_places: ClassVar[bool] = False
    """Whether batches must say where in its document each token stands."""
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
    chunk: int | None = setting(
        None,
        "Rows of vocabulary scores held at a time, computed again in the backward pass: less memory, and on a CPU less time. null: all.",
        unit="rows",
        ge=1,
        result=False,
    )


class TrimeSettings(ObjectiveSettings):
    """Next-token prediction with in-batch memory: the segment's own past (Zhong et al. 2022)."""

    kind: ClassVar[str] = "decoder"
    needs_places: ClassVar[bool] = True
    name: Literal["trimelm"] = "trimelm"
    ce_warmup_ratio: float = setting(0.05, "Share of the steps, the first ones, that learn by cross-entropy without memory.", ge=0, le=1)
    key_gradients: Literal["all", "own_segment"] = setting(
        "all", "Which queries teach a key: all that see it; own_segment: those of its own segment, as in the paper's code with a segment a GPU."
    )
    chunk: int | None = setting(
        512, "Rows of scores held at a time, as for causal, those of the memory too. null: all.", unit="rows", ge=1, result=False
    )


class TrimeLongSettings(TrimeSettings):
    """Next-token prediction with all earlier positions of a group of consecutive segments as memory (Zhong et al. 2022)."""

    needs: ClassVar[str] = "groups"
    groups: ClassVar[tuple[str, ...]] = ("consecutive",)
    name: Literal["trimelm_long"] = "trimelm_long"  # type: ignore[assignment]


class TrimeExtSettings(TrimeSettings):
    """Next-token prediction with every other segment of a group of similar ones as memory, besides the own past (Zhong et al. 2022)."""

    needs: ClassVar[str] = "groups"
    name: Literal["trimelm_ext"] = "trimelm_ext"  # type: ignore[assignment]
    local_dropped: float = setting(0.9, "Probability that a segment's own past is switched off, so that it learns from the others.", ge=0, le=1)


AnyObjective = Annotated[MlmSettings | CausalSettings | TrimeSettings | TrimeLongSettings | TrimeExtSettings, Field(discriminator="name")]
