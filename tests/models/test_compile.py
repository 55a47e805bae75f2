"""Pruned models under torch.compile: one graph, for any batch and length."""

from __future__ import annotations

import shutil

import pytest
import torch

from pipeline.models.modeling_trimline import TrimlineForSequenceClassification
from pipeline.models.positions import SCHEMES


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every model is new to it: it gives up on code that it has compiled too often for others."""
    torch._dynamo.reset()


def assert_same(compiled, model):
    for rows, length in ((3, 8), (2, 11), (5, 16)):
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, 5:] = 0
        ids = torch.randint(5, 40, (rows, length))
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, mask).logits, model(ids, mask).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", SCHEMES)
def test_a_pruned_model_is_one_graph(make_config, pruned, positions):
    model = pruned(TrimlineForSequenceClassification(make_config(positions=positions)).eval())
    assert_same(torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"), model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes C++, and there is no g++")
def test_a_compiled_pruned_model_gives_the_same_logits(make_config, pruned):
    model = pruned(TrimlineForSequenceClassification(make_config(positions="tupe-relative")).eval())
    assert_same(torch.compile(model, fullgraph=True, dynamic=True), model)
