"""What a model is trained for: one file an objective, each an `nn.Module` that returns named losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.objectives.base import Objective
    from pipeline.objectives.settings import AnyObjective


def build(settings: AnyObjective, tokenizer: PreTrainedTokenizerBase, seed: int) -> Objective:
    """The objective that the settings name. `seed` is that of its draws about the data."""
    if settings.name == "mlm":
        from pipeline.objectives.mlm import Mlm

        return Mlm(settings, tokenizer, seed)
    from pipeline.objectives.causal import Causal

    return Causal()
