"""Faults of the official code that no other file here has a test of."""

import pytest
import torch

from pipeline.compression.distillation import Distillation
from pipeline.compression.masks import Masks
from pipeline.compression.settings import DistillationSettings, SparsitySettings
from pipeline.compression.sparsity import Prunable

INPUTS = {"input_ids": torch.arange(1, 13).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def test_a_layer_whose_output_happens_to_be_zero_is_not_taken_for_dead(encoder):
    """It tests the sum of the masked output, and leaves the LayerNorm out where that is 0; what is dead says the mask."""
    model = encoder()
    with torch.no_grad():
        for part in (model.model.layers[1].attention.output, model.model.layers[1].feed_forward.down):
            part.weight.zero_()
            part.bias.zero_()
        masks = {"heads": torch.ones(3, 4), "neurons": torch.ones(3, 48), "attention": torch.ones(3), "feedforward": torch.ones(3)}
        whole, masked = model(**INPUTS).logits, model(**INPUTS, masks=masks).logits
        masks["attention"][1], masks["feedforward"][1] = 0, 0
        dead = model(**INPUTS, masks=masks).logits
    torch.testing.assert_close(masked, whole, atol=1e-6, rtol=1e-5)
    assert (dead - whole).abs().max() > 1e-3


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.3])
def test_prepruning_is_as_long_as_the_settings_say(ratio):
    """Its 100 steps are written into the code."""
    masks = Masks(Prunable(2, 16, 2, 32), SparsitySettings(prepruning_ratio=ratio), target=0.5, steps=2000, seed=1)
    assert masks.start == round(2000 * ratio)
    for step, drawn in ((masks.start - 1, False), (masks.start, True)):
        masks.before_step(step)
        assert (masks.sample() is not None) == drawn


def test_training_without_masks_starts_none_however_long_it_is(encoder):
    """At step 100 of its final fine-tuning it asks a module that is not there for masks."""
    objective = Distillation(encoder(seed=1), DistillationSettings(layers=0))
    losses = objective(encoder(), {**INPUTS, "labels": torch.tensor([0, 1])}, 5000)
    assert set(losses) == {"distill"}


def test_masks_on_layers_alone_are_a_whole_module():
    """It fails without heads or neurons; every subset of units has an expected size and settled masks."""
    masks = Masks(Prunable(4, 16, 2, 32), SparsitySettings(units=("feedforward",)), target=0.3, steps=10, seed=1)
    assert set(masks.settle()[0]) == {"feedforward"}
    assert 0 <= masks.expected_sparsity().item() < 0.1
