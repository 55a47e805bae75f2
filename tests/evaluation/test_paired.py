import numpy as np
import pytest

from pipeline.evaluation.paired import paired


def test_the_mean_difference_and_its_error_over_blocks():
    draws = np.random.default_rng(0)
    a, b = draws.normal(3, 1, 4096), draws.normal(2, 1, 4096)
    mean, error = paired(a, b)
    blocks = (a - b).reshape(4, 1024).mean(1)
    assert mean == pytest.approx((a - b).mean())
    assert error == pytest.approx(blocks.std(ddof=1) / 2)


def test_what_is_alike_within_blocks_does_not_count_as_many_observations():
    level = np.repeat(np.random.default_rng(0).normal(size=50), 1024)
    _, blocks = paired(level, np.zeros_like(level))
    _, places = paired(level, np.zeros_like(level), block=1)
    assert blocks == pytest.approx(places * 32, rel=0.02)


def test_a_short_last_block_counts_by_its_length_and_one_block_has_no_error():
    a = np.concatenate([np.zeros(1024), np.ones(1024), [100.0]])
    mean, error = paired(a, np.zeros_like(a))
    assert mean == pytest.approx(a.mean())
    assert np.isfinite(error)
    assert paired(a[:10], a[:10]) == (0.0, float("inf"))
