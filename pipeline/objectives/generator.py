"""The small encoder that fills in what was hidden: ELECTRA's generator (Clark et al. 2020), MC-BERT's meta-controller (Xu et al. 2020).

Built as in MC-BERT's code: the token embedding is the model's, followed by a linear map to the generator's width, and the output matrix is that
projected embedding; positions, layers and the dense layer before the output are the generator's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import size
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineModel
from pipeline.models.vocabulary import linear_scores
from pipeline.objectives.base import Batch
from pipeline.objectives.sampling import sample
from pipeline.objectives.settings import GeneratorSettings

Mixer = Callable[[Tensor], Tensor]


class Generator(nn.Module):
    """An encoder that is narrower than the model of this configuration, trained by masked language modelling.

    own_bias: whether it has a vocabulary bias of its own, for a model that has none to share. chunk: rows of vocabulary scores held at a time.
    Raises UserError where it would be larger than the model.
    """

    def __init__(self, settings: GeneratorSettings, model: TrimlineConfig, *, own_bias: bool, chunk: int):
        super().__init__()
        config = shape(settings, model)
        width, self.vocab_size = config.hidden_size, model.vocab_size
        self.temperature, self.chunk = settings.temperature, chunk
        self.project = nn.Linear(model.hidden_size, width)
        self.body = TrimlineModel(config, add_pooling_layer=False)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, config.layer_norm_eps))
        self.bias = nn.Parameter(torch.zeros(model.vocab_size)) if own_bias else None
        initialise(self.project, config)
        initialise(self.transform, config)

    def forward(
        self, embedding: Tensor, bias: Tensor | None, batch: Batch, where: Tensor, uniform: Tensor, mixer: Mixer | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of a masked batch, the mean loss of its labelled places, in nats, and tokens int64 [N, k] drawn at the N places `where`.

        embedding [V, d] and bias [V] of the model (bias None: its own); where: bool [B, L]; uniform [N, 2 k] as for `sample`;
        mixer as for `TrimlineModel`.
        """
        table = self.project(embedding)  # all tokens at once: what they are looked up in is also the output matrix
        bias = self.bias if bias is None else bias
        assert bias is not None
        given = {name: batch[name] for name in ("attention_mask", "document_ids") if name in batch}
        hidden = self.body(inputs_embeds=F.embedding(batch["input_ids"], table), input_mixer=mixer, **given).last_hidden_state
        labelled = batch["labels"] != -100
        labels = batch["labels"][labelled]
        partition, target = linear_scores(self.transform(hidden[labelled]), table, bias, labels, self.chunk)
        with torch.no_grad():
            drawn = sample(self.transform(hidden[where]), table, bias, uniform, temperature=self.temperature, chunk=self.chunk)
        return (partition - target).sum() / max(len(labels), 1), drawn

    def training_flops_per_row(self, length: int, predicted: float, drawn: float) -> float:
        """Forward and backward on one row. predicted, drawn: shares of its places that are learned from, and where tokens are drawn."""
        width = self.body.config.hidden_size
        output = 2.0 * width * (self.vocab_size + width)
        return size.training_flops_per_row(self.body.config, length, predicted=0) + length * output * (3 * predicted + drawn)


def shape(settings: GeneratorSettings, model: TrimlineConfig) -> TrimlineConfig:
    """The generator's configuration: the model's, with fewer heads of the same width and no table of tokens.

    As in MC-BERT's code a third of the heads, so of a BERT-base (768 wide, 12 heads, 3072 neurons) 256, 4 and 1024.
    Raises UserError where a number is larger than the model's.
    """
    layers, heads, ffn = model.num_hidden_layers, max(model.heads_per_layer), max(model.ffn_per_layer)
    if larger := settings.larger_than(layers, heads, ffn):
        raise UserError(larger)
    own_heads = settings.heads or max(round(heads / 3), 1)
    width = own_heads * model.head_dim
    own_layers, own_ffn = settings.layers or layers, settings.ffn or max(round(ffn * width / model.hidden_size), 1)
    config = copy.deepcopy(model)
    config.vocab_size = config.type_vocab_size = 0
    config.heads_kept = None
    config.hidden_size, config.num_hidden_layers = width, own_layers
    config.heads_per_layer, config.ffn_per_layer = [own_heads] * own_layers, [own_ffn] * own_layers
    return config


def initialise(module: nn.Module, config: TrimlineConfig) -> None:
    """Weights as the model's are drawn: normal, biases 0."""
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=config.initializer_range)
            nn.init.zeros_(linear.bias)
