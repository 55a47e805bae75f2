"""A model as an ONNX graph, for runtimes without PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models import size
from pipeline.models.modeling_trimline import TrimlinePreTrainedModel
from pipeline.models.positions import SCHEMES, AbsolutePositions, UntiedPositions
from pipeline.models.quiet import quiet

OUTPUTS = {"TrimlineForQuestionAnswering": ("start_logits", "end_logits"), "TrimlineModel": ("last_hidden_state",)}
"""By class; the others have logits."""
ONE_FILE = 2**28
"""Parameters above which weights lie in a file beside the graph, which may have 2 GB."""


def check() -> None:
    """Raises UserError where the packages that write a graph are not installed."""
    lacking = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if lacking:
        raise UserError(f"an ONNX graph is written with {' and '.join(lacking)}, not installed: pip install 'trimline[onnx]', or leave onnx out")


def export(model: TrimlinePreTrainedModel, path: str | Path) -> None:
    """Write the graph of evaluation, of any number of rows and tokens, in fp32.

    Inputs are int64 `input_ids` and `attention_mask` [batch, length], and `token_type_ids` of a model that has token types; outputs `logits`, or
    `start_logits` and `end_logits`, or a body's `last_hidden_state`. Rows of a model with learned positions have at most as many tokens as it has
    positions.
    """
    check()
    config = copy.deepcopy(model.config)
    config.unpadded = False  # how many tokens are real would be another unknown length
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    graph = _Graph(plain).eval().requires_grad_(False)  # with gradients, a learned bias goes through a kernel of our own
    names = ["input_ids", "attention_mask", *["token_type_ids"] * bool(config.type_vocab_size)]
    learned = issubclass(SCHEMES[config.positions], AbsolutePositions | UntiedPositions)
    longest = config.max_position_embeddings if learned else None
    rows, tokens = torch.export.Dim("batch"), torch.export.Dim("length", max=longest)
    example = torch.ones(2, min(8, config.max_position_embeddings), dtype=torch.int64)
    examples = tuple(example.clone() if name != "token_type_ids" else torch.zeros_like(example) for name in names)  # one tensor would be one input
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")  # of inputs that share their axes
        torch.onnx.export(
            graph,
            examples,
            Path(path),
            input_names=names,
            output_names=list(graph.outputs),
            dynamic_shapes=[{0: rows, 1: tokens}] * len(names),
            external_data=size.parameters(model) > ONE_FILE,
            dynamo=True,
            verbose=False,
        )


class _Graph(nn.Module):
    """A model's inputs and outputs by place."""

    def __init__(self, model: TrimlinePreTrainedModel):
        super().__init__()
        self.model = model
        self.outputs = OUTPUTS.get(type(model).__name__, ("logits",))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> tuple[Tensor, ...]:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return tuple(output[name] for name in self.outputs)
