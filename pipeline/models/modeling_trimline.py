"""The transformer: BERT's encoder (Devlin et al. 2019) or a causal decoder, with layers of any width and masks on its units.

This file, `attention.py`, `positions.py` and `adaptive.py` are copied into exported model directories and run there without Trimline, so they
import nothing but torch, transformers and each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .adaptive import AdaptiveEmbedding, AdaptiveHead
from .attention import Attention, Packing, linear, open_units
from .positions import SCHEMES, Positions, full_width, positions_within

Masks = dict[str, Tensor]
"""CoFi's masks (Xia et al. 2022, section 3.1), any of them: `heads` [layers, heads] multiplies each head's context (z_head), `neurons` [layers, ffn]
each neuron's output (z_int), `attention` and `feedforward` [layers] what their sub-layer adds (z_MHA, z_FFN), `hidden` [d] whatever is written
to the residual stream (z_hidn), whose LayerNorms then run over its dimensions that are not 0.

Entries past a layer's own width are ignored. A sub-layer whose mask is 0, or whose units are all 0, acts as if it were removed, residual LayerNorm
included, so that masking and removing give the same output.

A mask may differ by row, as gradients of each row ask for: `heads` [layers, B, heads], `neurons` [layers, B, 1, ffn], `attention` and
`feedforward` [layers, B, 1, 1], `hidden` [B, 1, d]. A sub-layer is then removed where its masks are 0 for all rows. Not for `unpadded` models.
"""
UNITS = frozenset({"heads", "neurons", "attention", "feedforward", "hidden"})
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""By Hugging Face's names."""
Mixer = Callable[[Tensor], Tensor]
"""Takes the sum of token and position vectors [B, L, d] before token types and LayerNorm, and gives what goes on in its place."""


class TrimlineConfig(PretrainedConfig):
    """Shape of a model.

    heads_per_layer, ffn_per_layer: heads and feed-forward neurons of each layer; 0 means the sub-layer is gone. heads_kept: where a layer has
    lost heads to pruning, the numbers of those it kept, None where it has all; positions that differ by head need them. full_hidden_size: the width
    before dimensions of it were pruned, which the pooler and untied positions still have; None where it is `hidden_size`.
    kind: `encoder` or `decoder`. norm: LayerNorm `post` (BERT) or `pre` (GPT-2) each sub-layer.
    positions: name of a scheme in `positions.SCHEMES`; untie_cls: see `UntiedPositions` there. type_vocab_size: token types (BERT's segments A
    and B), 0 for none.
    attention_dropout: None means `dropout`. final_norm: whether a pre-norm stack ends in a LayerNorm. scale_embeddings: token embeddings
    times sqrt(d). unpadded: whether all but attention runs on real tokens alone.
    adaptive: a decoder's `cutoffs`, `factor`, `tie_projections`, `dropout` of `adaptive.py`; None for one table.
    activation: name in `ACTIVATIONS`, of the feed-forward blocks and the masked language model's head. family: `bert` or `roberta`, whose classes
    of Hugging Face can hold the model while it is whole.
    """

    model_type = "trimline"

    def __init__(
        self,
        vocab_size: int = 8000,
        hidden_size: int = 256,
        head_dim: int = 64,
        heads_per_layer: list[int] | tuple[int, ...] = (4, 4, 4, 4),
        ffn_per_layer: list[int] | tuple[int, ...] = (1024, 1024, 1024, 1024),
        heads_kept: list[list[int] | None] | None = None,
        full_hidden_size: int | None = None,
        kind: str = "encoder",
        family: str = "bert",
        norm: str = "post",
        positions: str = "absolute",
        untie_cls: bool = True,
        type_vocab_size: int = 0,
        activation: str = "gelu",
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        activation_dropout: float = 0.0,
        final_norm: bool = True,
        scale_embeddings: bool = False,
        unpadded: bool = False,
        adaptive: dict[str, Any] | None = None,
        max_position_embeddings: int = 512,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ):
        if len(heads_per_layer) != len(ffn_per_layer):
            raise ValueError(f"heads_per_layer names {len(heads_per_layer)} layers, ffn_per_layer {len(ffn_per_layer)}")
        kwargs["num_hidden_layers"] = len(heads_per_layer)
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.head_dim = head_dim
        self.heads_per_layer = list(heads_per_layer)
        self.ffn_per_layer = list(ffn_per_layer)
        self.heads_kept = heads_kept
        self.full_hidden_size = full_hidden_size
        self.kind = kind
        self.family = family
        self.norm = norm
        self.positions = positions
        self.untie_cls = untie_cls
        self.type_vocab_size = type_vocab_size
        self.activation = activation
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.activation_dropout = activation_dropout
        self.final_norm = final_norm
        self.scale_embeddings = scale_embeddings
        self.unpadded = unpadded
        self.adaptive = adaptive
        self.max_position_embeddings = max_position_embeddings
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.tie_word_embeddings = True
        self.use_cache = False
        super().__init__(**kwargs)


@dataclass
class TrimlineOutput(ModelOutput):
    """last_hidden_state [B, L, d]; pooler_output [B, d], tanh of the first token; hidden_states: embeddings and each layer's
    output, where asked for; memory_states [B, L, d], the input of the last feed-forward block there is (else the last hidden state);
    attention_scores: each layer's [B, heads, L, L] before the softmax, None of a layer without attention, where asked for."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory_states: Tensor | None = None
    attention_scores: tuple[Tensor | None, ...] | None = None


@dataclass
class TrimlineHeadOutput(ModelOutput):
    """loss: mean over the labelled targets, in nats; logits as the head says; the rest as in `TrimlineOutput`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory_states: Tensor | None = None
    attention_scores: tuple[Tensor | None, ...] | None = None


@dataclass
class TrimlineSpanOutput(ModelOutput):
    """loss: mean of the cross-entropies of start and end, in nats; start_logits, end_logits [B, L]; the rest as in `TrimlineOutput`."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    memory_states: Tensor | None = None
    attention_scores: tuple[Tensor | None, ...] | None = None


class FeedForward(nn.Module):
    def __init__(self, config: TrimlineConfig, neurons: int):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, neurons)
        self.down = nn.Linear(neurons, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = config.activation_dropout

    def forward(self, x: Tensor, neuron_mask: Tensor | None) -> Tensor:
        opened = open_units(neuron_mask)
        neurons = self.activation(linear(self.up, x, outputs=opened))
        if neuron_mask is not None:
            neurons = (neurons * (neuron_mask if opened is None else neuron_mask[opened])).to(x.dtype)
        return linear(self.down, F.dropout(neurons, self.dropout, self.training), inputs=opened)


class Norm(nn.LayerNorm):
    """LayerNorm; with a mask on the dimensions, over those that are not 0, and times the mask."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        if hidden is None:
            return super().forward(x)
        kept = (hidden != 0).float()
        count = kept.sum(-1, keepdim=True).clamp(min=1)
        centred = (x.float() - (x.float() * kept).sum(-1, keepdim=True) / count) * kept
        scale = torch.rsqrt(centred.square().sum(-1, keepdim=True) / count + self.eps)
        return ((centred * scale * self.weight + self.bias) * hidden).to(x.dtype)


def _shut(units: Tensor | None, layer: Tensor | None) -> Tensor | None:
    """The units' masks, 0 where their layer's own is: what does not act need not be computed."""
    return units if units is None or layer is None or layer.dim() else units * (layer != 0)


class LayerMasks(NamedTuple):
    """The masks of one layer: [heads], [neurons], two scalars, [d]; None where nothing is masked."""

    heads: Tensor | None
    neurons: Tensor | None
    attention: Tensor | None
    feedforward: Tensor | None
    hidden: Tensor | None


class Block(GradientCheckpointingLayer):
    """Attention, then feed-forward, each with its residual and LayerNorm; a sub-layer of no units is left out with its LayerNorm."""

    attention_norm: Any
    feed_forward_norm: Any

    def __init__(self, config: TrimlineConfig, heads: int, neurons: int, kept: list[int] | None):
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention = Attention(config, heads, kept) if heads else None
        self.attention_norm = Norm(config.hidden_size, config.layer_norm_eps) if heads else None
        self.feed_forward = FeedForward(config, neurons) if neurons else None
        self.feed_forward_norm = Norm(config.hidden_size, config.layer_norm_eps) if neurons else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        rotation: Tensor | None,
        packing: Packing | None,
        masks: LayerMasks,
        output_scores: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the block's output and the input of its feed-forward sub-layer, both as x, and where asked for the scores of its attention; None
        where there is no such sub-layer."""
        scores = None
        if self.attention is not None:
            inner = self.attention_norm(x, masks.hidden) if self.pre else x
            update, scores = self.attention(inner, mask, bias, rotation, packing, masks.heads, output_scores)
            x = self._join(x, update, self.attention_norm, masks.heads, masks.attention, masks.hidden)
        if self.feed_forward is None:
            return x, None, scores
        inner = self.feed_forward_norm(x, masks.hidden) if self.pre else x
        update = self.feed_forward(inner, masks.neurons)
        return self._join(x, update, self.feed_forward_norm, masks.neurons, masks.feedforward, masks.hidden), inner, scores

    def _join(self, x: Tensor, update: Tensor, norm: nn.Module, units: Tensor | None, layer: Tensor | None, hidden: Tensor | None) -> Tensor:
        for factor in (layer, hidden):
            update = update if factor is None else (update * factor).to(x.dtype)
        joined = x + self.dropout(update) if self.pre else norm(x + self.dropout(update), hidden)
        alive = [(mask != 0).any() for mask in (units, layer) if mask is not None]
        # Without the choice, the output bias and the LayerNorm of a fully masked sub-layer would still act.
        return torch.where(torch.stack(alive).all(), joined, x) if alive else joined


class Embeddings(nn.Module):
    """Tokens, positions and token types, added up. A model of no vocabulary has no table: it is given its token vectors."""

    def __init__(self, config: TrimlineConfig):
        super().__init__()
        if not config.vocab_size:
            self.word: Any = None
        elif config.adaptive is None:
            self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        else:
            self.word = AdaptiveEmbedding(config.hidden_size, config.vocab_size, config.adaptive["cutoffs"], config.adaptive["factor"])
        self.scale = math.sqrt(config.hidden_size) if config.scale_embeddings else 1.0
        self.positions = SCHEMES[config.positions](config)
        self.types = nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        self.norm = Norm(config.hidden_size, config.layer_norm_eps) if config.norm == "post" else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: Tensor,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        input_mixer: Mixer | None,
        packing: Packing | None,
        hidden: Tensor | None,
    ) -> Tensor:
        """tokens: int64 [B, L], or their vectors [B, L, d]. Returns [B, L, d], or [T, d] of the packing."""
        x = self.positions.embed((tokens if tokens.is_floating_point() else self.word(tokens)) * self.scale, position_ids)
        if input_mixer is not None:
            x = input_mixer(x)
        if self.types is not None:
            x = x + self.types(tokens.new_zeros(tokens.shape[:2], dtype=torch.int64) if token_type_ids is None else token_type_ids)
        if packing is not None:
            x = packing.pack(x)
        if hidden is not None:
            x = (x * hidden).to(x.dtype)
        return self.dropout(x if self.norm is None else self.norm(x, hidden))


class TrimlinePreTrainedModel(PreTrainedModel):
    config_class = TrimlineConfig
    config: TrimlineConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True


class TrimlineModel(TrimlinePreTrainedModel):
    """The body without a head. `add_pooling_layer`: whether an encoder ends in BERT's pooler."""

    def __init__(self, config: TrimlineConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        kept = config.heads_kept or [None] * len(config.heads_per_layer)
        layers = zip(config.heads_per_layer, config.ffn_per_layer, kept, strict=True)
        self.layers = nn.ModuleList(Block(config, *layer) for layer in layers)
        self.norm = Norm(config.hidden_size, config.layer_norm_eps) if config.norm == "pre" and config.final_norm else None
        self.pooler = nn.Linear(config.hidden_size, full_width(config)) if add_pooling_layer and config.kind == "encoder" else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings.word = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        masks: Masks | None = None,
        output_hidden_states: bool = False,
        document_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_mixer: Mixer | None = None,
        output_attention_scores: bool = False,
    ) -> TrimlineOutput:
        """input_ids [B, L], or `inputs_embeds` [B, L, d] in place of the token vectors; attention_mask [B, L], 1 for tokens and 0 for padding;
        token types are ignored by a model without them.

        document_ids: int64 [B, L], which of a row's documents a token is of, -1 for padding. A document's tokens stand together;
        attention then stays inside it and its positions start anew. An encoder's [cls], of the first document, sees that one alone.
        """
        masks = masks or {}
        if unknown := masks.keys() - UNITS:
            raise ValueError(f"masks has {sorted(unknown)}; known are {', '.join(sorted(UNITS))}")
        if document_ids is not None and position_ids is None:
            position_ids = positions_within(document_ids)
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            raise ValueError("give input_ids or inputs_embeds")
        packing = self._packing(attention_mask, document_ids) if self.config.unpadded else None
        x = self.embeddings(tokens, token_type_ids, position_ids, input_mixer, packing, masks.get("hidden"))
        positions: Positions = self.embeddings.positions
        bias = positions.bias(tokens, position_ids)
        bias = bias[None] if bias is not None and bias.dim() == 3 else bias
        mask = self._mask(bias, self._allowed(attention_mask, document_ids))
        rotation = positions.rotation(tokens, position_ids)
        states, scores, memory = [x], [], None
        by_layer = {unit: each.unbind() for unit, each in masks.items() if unit != "hidden"}
        for layer, block in enumerate(self.layers):
            layer_masks = self._of_layer(layer, by_layer, masks.get("hidden"))
            x, feed_forward_input, scores_of = block(x, mask, bias, rotation, packing, layer_masks, output_attention_scores)
            scores.append(scores_of)
            memory = memory if feed_forward_input is None else feed_forward_input
            states.append(x)
        if self.norm is not None:
            states[-1] = x = self.norm(x, masks.get("hidden"))
        memory = x if memory is None else memory
        if packing is not None:
            x, memory = packing.unpack(x), packing.unpack(memory)
            states = [packing.unpack(state) for state in states] if output_hidden_states else []
        return TrimlineOutput(
            last_hidden_state=x,
            pooler_output=torch.tanh(self.pooler(x[:, 0])) if self.pooler is not None else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            memory_states=memory,
            attention_scores=tuple(scores) if output_attention_scores else None,
        )

    def _of_layer(self, layer: int, masks: Mapping[str, Sequence[Tensor]], hidden: Tensor | None) -> LayerMasks:
        widths = {"heads": self.config.heads_per_layer[layer], "neurons": self.config.ffn_per_layer[layer]}
        heads, neurons = (masks[unit][layer][..., :width] if unit in masks and width else None for unit, width in widths.items())
        attention, feedforward = (masks[unit][layer] if unit in masks else None for unit in ("attention", "feedforward"))
        return LayerMasks(_shut(heads, attention), _shut(neurons, feedforward), attention, feedforward, hidden)

    def _allowed(self, attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
        """Boolean [B, 1, 1 or L, L], true where a query may look at a key; None where there is nothing to hide but a decoder's future."""
        if document_ids is not None:
            if attention_mask is not None:
                document_ids = document_ids.masked_fill(attention_mask == 0, -1)
            allowed = (document_ids[:, :, None] == document_ids[:, None, :])[:, None]
        elif attention_mask is not None:
            allowed = attention_mask[:, None, None, :].bool()
        else:
            return None
        return allowed & _past(allowed) if self.config.kind == "decoder" else allowed

    def _packing(self, attention_mask: Tensor | None, document_ids: Tensor | None) -> Packing | None:
        real = [known for known in (attention_mask, None if document_ids is None else document_ids >= 0) if known is not None]
        return Packing.of(torch.stack([known.bool() for known in real]).all(dim=0)) if real else None

    def _mask(self, bias: Tensor | None, allowed: Tensor | None) -> Tensor | None:
        """What attention adds to its scores, or, where that is nothing, the boolean mask.

        Hidden keys get the lowest number there is, not minus infinity: a row of padding alone then stays finite.
        """
        if bias is None:
            return allowed
        if allowed is None and self.config.kind == "decoder":
            allowed = _past(bias)
        return bias if allowed is None else torch.where(allowed, bias, torch.finfo(bias.dtype).min)


def _past(scores: Tensor) -> Tensor:
    """Boolean [L, L], true at each query's own place and before it; scores [.., L] say how many."""
    length = scores.shape[-1]
    return torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()


class MaskedLMHead(nn.Module):
    def __init__(self, config: TrimlineConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = Norm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.decoder(self.norm(self.activation(self.dense(x)), hidden))


def _of_body(body: TrimlineOutput) -> tuple[Any, ...]:
    """What a head hands on, in the order of the outputs' fields."""
    return body.last_hidden_state, body.hidden_states, body.memory_states, body.attention_scores


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that are not -100, in fp32; 0, with a gradient of 0, where there are none."""
    total = F.cross_entropy(logits.float(), labels, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


class TrimlineForMaskedLM(TrimlinePreTrainedModel):
    """BERT's masked language model: its output matrix is the token embedding."""

    _tied_weights_keys = {"head.decoder.weight": "model.embeddings.word.weight"}  # noqa: RUF012 transformers' own convention

    def __init__(self, config: TrimlineConfig):
        super().__init__(config)
        self.model = TrimlineModel(config, add_pooling_layer=False)
        self.head = MaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head.decoder = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **inputs: Any) -> TrimlineHeadOutput:
        """logits [B, L, vocab]. With `labels` [B, L] only the T labelled positions (not -100) are projected: logits [T, vocab], in row order."""
        body = self.model(input_ids, attention_mask, **inputs)
        x, loss, hidden = body.last_hidden_state, None, (inputs.get("masks") or {}).get("hidden")
        if labels is not None:
            labelled = labels != -100
            if hidden is not None:
                hidden = hidden.expand_as(x)[labelled]
            x, labels = x[labelled], labels[labelled]
        logits = self.head(x, hidden)
        if labels is not None:
            loss = mean_cross_entropy(logits, labels)
        return TrimlineHeadOutput(loss, logits, *_of_body(body))


class TrimlineForCausalLM(TrimlinePreTrainedModel, GenerationMixin):
    """Next-token prediction with tied embeddings. `generate` works without a key-value cache: each token costs a full pass."""

    def __init__(self, config: TrimlineConfig):
        super().__init__(config)
        self.model = TrimlineModel(config, add_pooling_layer=False)
        word, shape = "model.embeddings.word", (config.hidden_size, config.vocab_size)
        adaptive = None if config.adaptive is None else AdaptiveHead(*shape, **config.adaptive)
        self.head: Any = adaptive or nn.Linear(*shape, bias=False)
        self._tied_weights_keys = adaptive.tied("head", word) if adaptive else {"head.weight": f"{word}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, return_dict: bool = True, **inputs: Any
    ) -> TrimlineHeadOutput | tuple[Any, ...]:
        """logits [B, L, vocab]. `labels` [B, L] are aligned with the input: the loss at position i is that of labels[i + 1].

        With labels an adaptive softmax computes the loss alone, and the logits are None.
        """
        body = self.model(input_ids, attention_mask, **inputs)
        hidden, logits = body.last_hidden_state, None
        if labels is not None and self.config.adaptive is not None:
            loss = self.head.loss(hidden[:, :-1], labels[:, 1:])
        else:
            logits = self.head(hidden)
            loss = None if labels is None else mean_cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output = TrimlineHeadOutput(loss, logits, *_of_body(body))
        return output if return_dict else output.to_tuple()


class TrimlineForSequenceClassification(TrimlinePreTrainedModel):
    """A class, or a number where `config.num_labels` is 1, from BERT's pooler."""

    def __init__(self, config: TrimlineConfig):
        super().__init__(config)
        if config.kind != "encoder":
            raise ValueError(f"classification needs a model of kind encoder, found {config.kind}")
        assert config.num_labels is not None
        self.model = TrimlineModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(full_width(config), config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **inputs: Any) -> TrimlineHeadOutput:
        """logits [B, labels]. labels [B]: cross-entropy with class numbers, or mean squared error with numbers."""
        body = self.model(input_ids, attention_mask, **inputs)
        logits, loss = self.classifier(self.dropout(body.pooler_output)), None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits.squeeze(-1).float(), labels.float())
        elif labels is not None:
            loss = mean_cross_entropy(logits, labels)
        return TrimlineHeadOutput(loss, logits, *_of_body(body))


class TrimlineForQuestionAnswering(TrimlinePreTrainedModel):
    """The first and the last token of an answer within the row (Devlin et al. 2019, section 4.2)."""

    def __init__(self, config: TrimlineConfig):
        super().__init__(config)
        if config.kind != "encoder":
            raise ValueError(f"question answering needs a model of kind encoder, found {config.kind}")
        self.model = TrimlineModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **inputs: Any,
    ) -> TrimlineSpanOutput:
        """start_positions, end_positions [B]: places of the answer's first and last token."""
        body = self.model(input_ids, attention_mask, **inputs)
        start_logits, end_logits = self.qa_outputs(body.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (mean_cross_entropy(start_logits, start_positions) + mean_cross_entropy(end_logits, end_positions)) / 2
        return TrimlineSpanOutput(loss, start_logits, end_logits, *_of_body(body))
