"""Against numbers computed by the original implementation (CoFi's mask module, d 8, ffn 32, 2 heads, 3 layers)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.compression.hard_concrete import EPSILON, LIMIT, HardConcrete

ORIGINAL = np.load(Path(__file__).parent / "hard_concrete.npz")
MODULE = np.load(Path(__file__).parent / "mask_module.npz")


def masks_of(log_alpha, **settings):
    masks = HardConcrete(log_alpha.shape, **settings)
    masks.log_alpha = torch.nn.Parameter(torch.from_numpy(log_alpha))
    return masks


def test_samples_and_their_slopes_are_the_originals():
    log_alpha = np.broadcast_to(ORIGINAL["log_alpha"][:, None], ORIGINAL["sample"].shape).copy()
    masks = masks_of(log_alpha)
    sample = masks.sample(torch.from_numpy(np.broadcast_to(ORIGINAL["noise"], log_alpha.shape).copy()))
    sample.sum().backward()
    np.testing.assert_allclose(sample.detach(), ORIGINAL["sample"], atol=1e-5)
    np.testing.assert_allclose(masks.log_alpha.grad, ORIGINAL["slope"], atol=1e-5)


def test_keep_probabilities_are_the_originals():
    np.testing.assert_allclose(masks_of(ORIGINAL["log_alpha"]).keep_probability().detach(), ORIGINAL["keep"], atol=1e-5)


@pytest.mark.parametrize(("log_alpha", "keep"), [(0.0, 0.831822), (LIMIT, 0.997982), (-LIMIT, 0.047130), (10.0, 0.999991)])
def test_keep_probability_at_the_published_points(log_alpha, keep):
    assert masks_of(np.array([log_alpha])).keep_probability().item() == pytest.approx(keep, abs=1e-6)


@pytest.mark.parametrize("unit", ["heads", "neurons", "attention", "feedforward", "hidden"])
def test_training_and_evaluation_masks_of_a_whole_module_are_the_originals(unit):
    masks = masks_of(MODULE[f"{unit}_loga"], scalar=unit in ("attention", "feedforward"))
    np.testing.assert_allclose(masks.sample(torch.from_numpy(MODULE[f"{unit}_noise"])).detach(), MODULE[f"{unit}_train"], atol=1e-5)
    np.testing.assert_allclose(masks.deterministic(), MODULE[f"{unit}_eval"], atol=1e-5)


def test_openness_is_the_keep_probability_that_ends_at_0_and_1():
    masks = masks_of(np.array([-LIMIT, 0.0, LIMIT]))
    least, _, most = masks.keep_probability().tolist()
    assert masks.openness().tolist() == pytest.approx([0, (0.831822 - least) / (most - least), 1], abs=1e-5)


def test_evaluation_zeros_as_many_as_are_expected_in_each_row_rounding_half_to_even():
    masks = HardConcrete((2, 4))
    probability = torch.tensor([[0.5, 0.5, 0.75, 0.75], [0.25, 0.25, 0.5, 0.5]])  # 1.5 and 2.5 zeros: 2 and 2
    with torch.no_grad():
        masks.log_alpha.copy_(torch.logit(probability) + 2 / 3 * math.log(0.1 / 1.1))
    assert (masks.deterministic() == 0).sum(1).tolist() == [2, 2]
    assert masks.deterministic().max() < 1


def test_noise_of_zero_and_one_gives_finite_samples_and_gradients():
    masks = HardConcrete((2,), initial=0.0)
    sample = masks.sample(torch.tensor([0.0, 1.0]))
    sample.sum().backward()
    assert sample.tolist() == [0.0, 1.0]
    assert torch.isfinite(masks.log_alpha.grad).all()
    assert EPSILON == 1e-6


def test_clamping_and_the_start_are_the_official_ones():
    masks = HardConcrete(50, generator=torch.Generator().manual_seed(0))
    assert masks.log_alpha.dtype == torch.float32
    assert masks.log_alpha.mean().item() == pytest.approx(10, abs=0.01)
    masks.clamp_()
    assert masks.log_alpha.unique().tolist() == pytest.approx([4.60517])
    assert masks.deterministic().max().item() == pytest.approx(0.996035, abs=1e-6)
