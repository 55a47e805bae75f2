"""What a model is trained for: one file an objective, each an `nn.Module` that returns named losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.objectives.settings import CausalSettings, DistillSettings, ElectraSettings, MetaControllerSettings, MlmSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from pipeline.objectives.base import Objective
    from pipeline.objectives.settings import AnyObjective


def build(
    settings: AnyObjective,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    model: PretrainedConfig | None = None,
    steps: int = 0,
    group_size: int = 1,
    ranks_per_group: int = 1,
    memory_module: str | None = None,
) -> Objective:
    """The objective that the settings name; of distill, whose teacher is not here (compression.general), its masked language modelling.

    seed: of its draws about the data. model: configuration of the model to train, which a generator is made after. steps: of the whole
    training, of which warm-ups are a share. group_size: rows of a group, on `ranks_per_group` ranks. memory_module: see `CausalReader`.
    """
    if isinstance(settings, MlmSettings | DistillSettings):
        from pipeline.objectives.mlm import Mlm

        return Mlm(settings, tokenizer, seed)
    if isinstance(settings, ElectraSettings):
        from pipeline.objectives.electra import Electra

        assert model is not None
        return Electra(settings, tokenizer, seed, model)
    if isinstance(settings, MetaControllerSettings):
        from pipeline.objectives.meta_controller import MetaController

        assert model is not None
        return MetaController(settings, tokenizer, seed, model)
    if isinstance(settings, CausalSettings):
        from pipeline.objectives.causal import Causal

        return Causal(settings.chunk, memory_module)
    from pipeline.objectives import trime

    kinds: dict[str, type[trime.Trime]] = {"trimelm": trime.TrimeLocal, "trimelm_long": trime.TrimeLong, "trimelm_ext": trime.TrimeExternal}
    together = {"rows": group_size // ranks_per_group, "ranks": ranks_per_group} if settings.needs == "groups" else {}
    return kinds[settings.name](settings, seed, ce_warmup_steps=round(settings.ce_warmup_ratio * steps), memory_module=memory_module, **together)
