import numpy as np
import pytest

from pipeline.memory.sampling import Sampling

PROBABILITY = np.array([0.1, 0.5, 0.25, 0.15])


def shares(sampling, count=4000):
    draws = np.random.default_rng(sampling.seed)
    return np.bincount([sampling.draw(np.log(PROBABILITY), draws) for _ in range(count)], minlength=4) / count


def test_tokens_are_drawn_as_often_as_they_are_likely():
    np.testing.assert_allclose(shares(Sampling()), PROBABILITY, atol=0.03)
    squared = PROBABILITY**2 / (PROBABILITY**2).sum()
    np.testing.assert_allclose(shares(Sampling(temperature=0.5)), squared, atol=0.03)


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(top_p=0.7)])
def test_only_the_likeliest_are_drawn_from_and_keep_their_odds(sampling):
    found = shares(sampling)
    assert found[[0, 3]].tolist() == [0, 0]
    assert found[1] == pytest.approx(2 / 3, abs=0.03)


@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(top_k=1), Sampling(top_p=0.0), Sampling(temperature=0.01)])
def test_the_likeliest_alone(sampling):
    assert shares(sampling, 50)[1] == 1


def test_a_token_without_probability_is_never_drawn():
    with np.errstate(divide="ignore"):
        impossible = np.log(np.array([0.0, 0.5, 0.5]))
    draws = np.random.default_rng(0)
    assert {Sampling().draw(impossible, draws) for _ in range(300)} == {1, 2}
