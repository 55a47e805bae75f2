"""What ELECTRA and MC-BERT share: a generator fills in what was hidden, and the model reads the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.models.modeling_trimline import TrimlineConfig
from pipeline.objectives.base import Batch, Objective
from pipeline.objectives.generator import Generator
from pipeline.objectives.masking import Masking
from pipeline.objectives.sampling import FIRST_STREAM
from pipeline.objectives.settings import ReplacedTokenSettings
from pipeline.packing.draws import uniform


class ReplacedTokens(Objective):
    """Loss `mlm`, the generator's, a mean over what was hidden. No gradient flows through what it draws (Clark et al. 2020, section 2).

    model: configuration of the model to train.
    Raises UserError where that is not an encoder of Trimline's or BERT's, or smaller than the generator.
    """

    drawn: int
    """Tokens drawn at a place."""

    def __init__(self, settings: ReplacedTokenSettings, tokenizer: PreTrainedTokenizerBase, seed: int, model: PretrainedConfig):
        super().__init__()
        if not isinstance(model, TrimlineConfig):
            raise UserError(
                f"{model.name_or_path}: objective {settings.name} cannot train a model of type {model.model_type!r}; "
                "start from one of Trimline's or a BERT"
            )
        self.predicted = 0.0  # by the model itself, no place is predicted out of the whole vocabulary
        self.mask_rate, self.seed = settings.mask_rate, seed
        self.masking = Masking(settings, tokenizer, seed)
        self.generator = Generator(settings.generator, model, own_bias=settings.head == "none", chunk=settings.chunk)

    def prepare(self, batch: Batch, step: int) -> Batch:
        return self.masking(batch, step)

    def fill_in(self, model: Any, bias: Tensor | None, batch: Batch, step: int, where: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's loss, and what it draws at the N places `where` (bool [B, L]): int64 [N, k]. Draws are of (seed, step, segment)."""
        length, streams = where.shape[1], range(FIRST_STREAM, FIRST_STREAM + 2 * self.drawn)
        numbers = torch.stack([uniform(self.seed, step, batch["segment"], length, stream)[where] for stream in streams], dim=1)
        mixer = self.notes.mixer(batch, self.generator.project) if self.notes is not None else None
        return self.generator(model.get_input_embeddings().weight, bias, batch, where, numbers, mixer)

    def read(self, model: Any, batch: Batch, corrupted: Tensor) -> Tensor:
        """The model's last hidden states [B, L, d] of the filled-in rows."""
        given = {name: batch[name] for name in ("attention_mask", "document_ids") if name in batch}
        mixer = self.notes.mixer(batch) if self.notes is not None else None
        hidden: Tensor = model.base_model(corrupted, input_mixer=mixer, **given).last_hidden_state
        if self.notes is not None:
            self.notes.collect(batch, hidden)
        return hidden
