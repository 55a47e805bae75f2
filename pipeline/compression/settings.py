"""How a student is pruned (CoFi, Xia et al. 2022) and what it learns from its teacher."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting

Unit = Literal["attention", "feedforward", "heads", "neurons", "hidden"]


class DistillationSettings(Settings):
    """The loss a student learns its teacher from."""

    temperature: float = setting(2.0, "Temperature of the soft labels.", gt=0)
    prediction: float = setting(1.0, "Weight of the soft-label loss.", ge=0)
    hard_labels: float = setting(0.0, "Weight of the cross-entropy with the true labels.", ge=0)


class SparsitySettings(Settings):
    """What to remove, and how the masks get there."""

    target: float = setting(0.6, "Share of the encoder's prunable parameters to remove.", gt=0, lt=1)
    units: tuple[Unit, ...] = setting(("heads", "neurons"), "What the masks stand for.", min_length=1)
    prepruning_ratio: float = setting(0.05, "Share of the steps that only distil, before any mask moves.", ge=0, lt=1)
    warmup_ratio: float = setting(0.4, "Share of the steps over which the target rises from 0.", ge=0, lt=1)
    mask_lr: float = setting(0.05, "Learning rate of the masks' log alpha and of the Lagrange multipliers.", gt=0)
    gate_lr_ratio: float = setting(
        0.2,
        "Learning rate of the masks on whole layers, over mask_lr. At 1 such a mask travels as fast as each of the many in its layer and takes all"
        " of them with it, so that the layers fall first.",
        gt=0,
    )

    @model_validator(mode="after")
    def _leaves_steps(self) -> SparsitySettings:
        if self.prepruning_ratio + self.warmup_ratio >= 1:
            raise ValueError("prepruning_ratio + warmup_ratio must leave steps at the full target: keep their sum below 1")
        return self
