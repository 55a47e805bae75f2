from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline import recipe
from pipeline.models import build, size
from pipeline.models.modeling_trimline import TrimlineForCausalLM, TrimlineForMaskedLM
from pipeline.shipped import shipped


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


def test_tupe_computes_its_positions_once_for_all_rows_beyond_what_is_counted(make_config):
    model = TrimlineForMaskedLM(make_config(positions="tupe-relative")).eval()
    beyond = []
    for rows in (2, 5):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.ones(rows, 16, dtype=torch.long))
        beyond.append(counter.get_total_flops() - size.flops_per_token(model.config, 16) * rows * 16)
    assert beyond == [2 * (2 * 17 * 32 * 32 + 15 * 15 * 32)] * 2  # two projections of 17 rows; products of 15 positions


def test_predicting_fewer_positions_and_training_scale_the_count(make_config):
    config = make_config()
    all_, none = size.flops_per_token(config, 16), size.flops_per_token(config, 16, predicted=0.0)
    assert all_ - none == 2 * (32 * 32 + 32 * 40)
    assert size.training_flops_per_row(config, 16) == 3 * 16 * all_


class Vocabulary:
    """What a model asks of a tokenizer."""

    pad_token_id, bos_token_id, eos_token_id = 0, 2, 3

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return self.tokens


@pytest.mark.parametrize(
    ("name", "vocabulary", "layers", "published"),
    [("wikitext103-247m", 267_739, 201.5, 247), ("wikitext103-150m", 267_739, 38.4, 149), ("enwik8-38m", 261, 37.8, 38)],
)
def test_the_papers_models_have_the_papers_size(name, vocabulary, layers, published):
    """layers: of the blocks alone; both in millions. The rest are embeddings, their projections and the clusters of the softmax."""
    settings = recipe.load(shipped("recipes") / f"trime-{name}.yaml").model
    with torch.device("meta"):
        model = build.new(settings, Vocabulary(vocabulary))
    assert round(size.parameters(model) / 1e6) == published
    assert round(size.parameters(model.model.layers) / 1e6, 1) == layers


@pytest.mark.parametrize("path", sorted(shipped("recipes").glob("trime-*-[0-9]*m*.yaml")), ids=lambda path: path.stem)
def test_the_papers_recipes_hold_together(path):
    loaded = recipe.load(path)
    assert loaded.name == path.stem
    assert loaded.pretrain.batch_size * loaded.pack.length in (73_728, 72_000, 49_152)
