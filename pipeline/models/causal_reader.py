"""How a causal language model of any make is read: hidden states, memory states, and the vocabulary's scores.

TRIME's keys and queries are the input of the last feed-forward block (Zhong et al. 2022, section 3). Our decoder returns it; any other
model of Hugging Face is tapped there, by a hook on that block of its last layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.models.adaptive import AdaptiveHead
from pipeline.models.modeling_trimline import TrimlinePreTrainedModel
from pipeline.models.vocabulary import linear_scores, scores_of

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "ff", "block_sparse_moe", "feedforward", "fc1")
"""What the feed-forward block of a layer is called, in the models of Hugging Face; OPT's has no module of its own and begins with `fc1`."""


class CausalReader:
    """A causal language model and its memory states.

    memory_module: full name of the module whose input is the memory state (`model.layers.11.mlp`); found by itself where None.
    Raises UserError when there is no such module, or it cannot be found.
    """

    def __init__(self, model: PreTrainedModel, memory_module: str | None = None):
        self.model: Any = model
        self._ours = isinstance(model, TrimlinePreTrainedModel)
        self._tapped = None if self._ours and memory_module is None else _feed_forward(model, memory_module)

    @property
    def width(self) -> int:
        """d, the dimensions of a memory state."""
        return int(self.model.config.get_text_config().hidden_size)

    def read(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """What the model takes (`input_ids` [B, L], ...) -> its last hidden states [B, L, h] and memory states [B, L, d]."""
        if self._tapped is None:
            output = self.model.base_model(**inputs)
            return output.last_hidden_state, output.memory_states
        caught: list[Tensor] = []

        def catch(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            caught.append(arguments[0] if arguments else next(iter(named.values())))

        hook = self._tapped.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
        try:
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        finally:
            hook.remove()
        return hidden, caught[0].view(*hidden.shape[:-1], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., h] -> scores of the vocabulary [..., V], whose log sum exp is the partition."""
        return self.model.get_output_embeddings()(hidden)

    def scores(self, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """hidden [N, h], targets int64 [N] -> log partition of the vocabulary and score of the target, fp32 [N].

        chunk: rows of logits held at a time, forward and backward; None: all of them.
        """
        head = self.model.get_output_embeddings()
        if isinstance(head, AdaptiveHead):
            return head.scores(hidden, targets, chunk)
        if chunk is None:
            return scores_of(head(hidden), targets)
        return linear_scores(hidden, head.weight, head.bias, targets, chunk)

    @torch.no_grad()
    def check(self) -> None:
        """Raises UserError when the scores that the model itself gives are not those of its head alone (Gemma 2 and others cap or scale them)."""
        model = self.model.eval()
        device = next(model.parameters()).device
        input_ids = torch.arange(4, device=device)[None] % model.config.get_text_config().vocab_size
        hidden, _ = self.read(input_ids=input_ids)
        if not torch.allclose(self.logits(hidden).float(), model(input_ids=input_ids).logits.float(), atol=1e-3, rtol=1e-3):
            raise UserError(
                f"{model.config.name_or_path}: a model of type {model.config.model_type!r} changes the scores after its output matrix, "
                "which memories cannot be joined with; start from a model whose scores are the output matrix times the hidden state"
            )


def _feed_forward(model: PreTrainedModel, name: str | None) -> nn.Module:
    place = model.config.name_or_path or type(model).__name__
    if name is not None:
        try:
            return model.get_submodule(name)
        except AttributeError:
            last = _last_layer(model)
            known = f"its last layer is {last[0]}, which has {', '.join(n for n, _ in last[1].named_children())}" if last else "see named_modules()"
            raise UserError(f"model.memory_module: {place} has no module {name!r}; {known}") from None
    found = _last_layer(model)
    if found is not None:
        layer = dict(found[1].named_children())
        block = next((layer[name] for name in FEED_FORWARD if name in layer), None)
        if block is not None:
            return block
    raise UserError(
        f"{place}: the feed-forward block of the last layer cannot be found in a model of type {model.config.model_type!r}; "
        "name it in the recipe, such as model.memory_module: model.layers.11.mlp"
    )


def _last_layer(model: PreTrainedModel) -> tuple[str, nn.Module] | None:
    """The last of the longest list of modules that has as many as the model has layers."""
    layers = model.config.get_text_config().num_hidden_layers
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    return (f"{lists[0][0]}.{layers - 1}", lists[0][1][-1]) if lists else None
