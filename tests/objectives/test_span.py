from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from pipeline.objectives.span import Span


def batch(width):
    """Two rows, of four and of two tokens, padded to `width`; answers at tokens 1 to 2, and at 0."""
    mask = (torch.arange(width) < torch.tensor([[4], [2]])).long()
    positions = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 0])}
    return {"input_ids": torch.zeros_like(mask), "attention_mask": mask, **positions, "example": torch.arange(2)}


def model(input_ids, attention_mask):
    """Every start alike; of the ends the first token is e times as likely as another; padding likeliest of all."""
    start = torch.where(attention_mask == 0, 9.0, 0.0)
    end = start.clone()
    end[:, 0] = 1.0
    return SimpleNamespace(start_logits=start, end_logits=end)


@pytest.mark.parametrize("width", [4, 8])
def test_the_loss_is_the_mean_of_start_and_end_and_padding_is_no_answer(width):
    objective = Span()
    prepared = objective.prepare(batch(width), 0)
    start = (math.log(4) + math.log(2)) / 2
    end = (math.log(math.e + 3) + math.log(math.e + 1) - 1) / 2
    assert objective(model, prepared, 0) == {"span": pytest.approx((start + end) / 2)}
    assert objective.targets(prepared) == {"span": 2}
