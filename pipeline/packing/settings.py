"""The `pack` section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.settings import Settings, setting


class PackSettings(Settings):
    length: int = setting(128, "Length of a segment as the model sees it, special tokens included.", unit="tokens", ge=8)
    segments: Literal["across", "within"] = setting(
        "across", "across: fixed length, running over document ends; within: never crossing one, the last of a document padded."
    )
    min_tokens: int = setting(8, "Shorter document tails are dropped (segments: within).", unit="tokens", ge=1)
    groups: Literal["random", "consecutive"] = setting(
        "random", "Which segments share a memory: random (groups of one) or consecutive neighbours of one document."
    )
    group_size: int = setting(1, "Segments in a group.", unit="segments", ge=1)
    ranks: int = setting(1, "Local MPI ranks.", ge=1, result=False)

    @model_validator(mode="after")
    def _fits(self) -> PackSettings:
        if self.groups == "random" and self.group_size != 1:
            raise ValueError("groups: random means groups of one segment; set group_size: 1 or groups: consecutive")
        if self.groups == "consecutive" and self.group_size < 2:
            raise ValueError("groups: consecutive needs group_size of 2 or more")
        if self.groups == "consecutive" and self.segments != "within":
            raise ValueError("groups: consecutive keeps documents apart; set segments: within")
        return self
