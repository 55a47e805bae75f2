from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import size
from pipeline.models.modeling_trimline import TrimlineForCausalLM, TrimlineForMaskedLM


def test_block_parameters_are_those_of_the_modules(make_config):
    for shape in ({}, {"heads_per_layer": [3, 0], "ffn_per_layer": [0, 7]}):
        model = TrimlineForMaskedLM(make_config(**shape))
        counted = sum(p.numel() for name, p in model.named_parameters() if ".attention." in name or ".feed_forward." in name)
        assert size.block_parameters(model.config) == counted


def test_a_tied_matrix_counts_once(make_config):
    model = TrimlineForCausalLM(make_config(kind="decoder"))
    assert size.parameters(model) == size.parameters(model.model)


def test_bert_base_has_the_known_number_of_block_parameters(make_config):
    base = make_config(hidden_size=768, head_dim=64, heads_per_layer=[12] * 12, ffn_per_layer=[3072] * 12)
    assert size.block_parameters(base) == 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_flops_are_those_that_torch_counts(make_config, kind):
    model = (TrimlineForMaskedLM if kind == "encoder" else TrimlineForCausalLM)(make_config(kind=kind, heads_per_layer=[3, 1])).eval()
    # The counter knows the plain attention kernel, not the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.ones(2, 16, dtype=torch.long))
    assert size.flops_per_token(model.config, 16) * 2 * 16 == counter.get_total_flops()


def test_predicting_fewer_positions_and_training_scale_the_count(make_config):
    config = make_config()
    all_, none = size.flops_per_token(config, 16), size.flops_per_token(config, 16, predicted=0.0)
    assert all_ - none == 2 * (32 * 32 + 32 * 40)
    assert size.training_flops_per_row(config, 16) == 3 * 16 * all_
