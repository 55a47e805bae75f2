import math

import numpy as np
import pytest
import torch

from pipeline.evaluation.perplexity import HeldOut, score
from pipeline.models.modeling_trimline import TrimlineConfig, TrimlineForCausalLM, TrimlineForMaskedLM
from pipeline.objectives.causal import Causal
from pipeline.objectives.mlm import Mlm
from pipeline.objectives.settings import MlmSettings

VOCAB = 20
LENGTHS = [8, 3, 8, 5, 8, 8, 2]


class Rows:
    """Seven padded rows, as `Loader.rows` gives them."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.tokens = [generator.integers(5, VOCAB, size=length) for length in LENGTHS]
        self.plan = type("Plan", (), {"segments": np.arange(len(LENGTHS) + 1)})

    def rows(self, segment):
        input_ids = np.zeros((len(segment), 8), dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, number in enumerate(segment):
            input_ids[row, : LENGTHS[number]], attention_mask[row, : LENGTHS[number]] = self.tokens[number], 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "segment": np.asarray(segment)}


class Roles:
    mask_token_id, all_special_ids, name_or_path = 4, [0, 1, 2, 3, 4], "test"

    def __len__(self):
        return VOCAB


def config(kind):
    torch.manual_seed(0)
    return TrimlineConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        head_dim=8,
        heads_per_layer=[2],
        ffn_per_layer=[32],
        kind=kind,
        max_position_embeddings=8,
        initializer_range=0.5,
    )


def test_a_decoders_loss_is_the_mean_over_every_token_but_the_first_of_a_row():
    model, rows = TrimlineForCausalLM(config("decoder")), Rows()
    found = score(model, Causal(), rows, batch_size=3)
    total = 0.0
    for tokens in rows.tokens:
        ids = torch.from_numpy(tokens)[None]
        with torch.no_grad():
            log_p = model(input_ids=ids).logits.log_softmax(-1)
        total -= sum(log_p[0, at, ids[0, at + 1]].item() for at in range(len(tokens) - 1))
    targets = sum(LENGTHS) - len(LENGTHS)
    assert (found.targets, found.segments, found.of_segments) == (targets, 7, 7)
    assert found.loss == pytest.approx(total / targets, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / targets), rel=1e-4)


def test_an_encoders_masks_are_the_same_for_every_batch_size_and_time():
    model, rows = TrimlineForMaskedLM(config("encoder")), Rows()
    objective = Mlm(MlmSettings(mask_rate=0.5), Roles(), seed=7)
    found = [score(model.train(), objective, rows, batch_size=size) for size in (1, 3, 7)]
    assert found[0].targets == found[1].targets == found[2].targets > len(LENGTHS)
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-5)
    assert found[0].loss == pytest.approx(found[2].loss, abs=1e-5)


def test_a_part_is_spread_over_the_split():
    seen = []

    class Watched(Rows):
        def rows(self, segment):
            seen.extend(segment.tolist())
            return super().rows(segment)

    found = score(TrimlineForCausalLM(config("decoder")), Causal(), Watched(), batch_size=2, max_segments=3)
    assert seen == [0, 2, 4]
    assert (found.segments, found.of_segments) == (3, 7)
    assert score(TrimlineForCausalLM(config("decoder")), Causal(), Rows(), batch_size=2, max_segments=100).segments == 7


def test_bits_per_byte_of_one_bit_a_token_and_four_bytes_a_token_is_a_quarter():
    assert HeldOut(math.log(2), targets=10, segments=1, of_segments=1).bits_per_byte(tokens=100, text_bytes=400) == pytest.approx(0.25)


def test_a_uniform_model_over_bytes_has_eight_bits_a_byte():
    held_out = HeldOut(math.log(256), targets=99, segments=1, of_segments=2)
    assert held_out.perplexity == pytest.approx(256)
    assert held_out.bits_per_byte(tokens=1000, text_bytes=1000) == pytest.approx(8)
