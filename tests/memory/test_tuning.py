import math

import pytest

from pipeline.memory.mixtures import Parameter
from pipeline.memory.tuning import tune

STEPS = tuple(float(step) for step in range(11))


def bowl(**lowest):
    return lambda values: sum((values[name] - value) ** 2 for name, value in lowest.items()) + 1.0


def test_a_planted_optimum_is_found_and_says_nothing():
    found = tune(bowl(a=7, b=2), {"a": Parameter(STEPS, 3), "b": Parameter(STEPS, 9)})
    assert (found.values, found.loss, found.warnings) == ({"a": 7, "b": 2}, 1, [])


def test_a_valley_across_the_coordinates_is_followed_to_its_end():
    """Along each coordinate every point of the valley a = b looks like the best."""

    def valley(values):
        return 100 * abs(values["a"] - values["b"]) + abs(values["a"] - 8)

    assert tune(valley, {"a": Parameter(STEPS, 2), "b": Parameter(STEPS, 2)}).values == {"a": 8, "b": 8}


@pytest.mark.parametrize(("lowest", "beyond"), [(-3, "below 0"), (14, "above 10")])
def test_an_optimum_at_the_end_of_its_grid_is_told(lowest, beyond):
    found = tune(bowl(a=lowest, b=5), {"a": Parameter(STEPS, 5), "b": Parameter(STEPS, 5)})
    (warning,) = found.warnings
    assert warning.startswith("a ")
    assert beyond in warning


def test_a_natural_end_and_a_fixed_value_are_not():
    found = tune(bowl(a=-3, b=5), {"a": Parameter(STEPS, 5, natural=(0.0,)), "b": Parameter((2.0,), 2.0)})
    assert (found.values, found.warnings) == ({"a": 0, "b": 2}, [])
    assert tune(bowl(a=12), {"a": Parameter(STEPS, 5, natural=(0.0,))}).warnings


def test_no_value_is_tried_twice_and_what_makes_no_difference_stays_where_it_began():
    tried = []

    def loss(values):
        tried.append(tuple(values.values()))
        return math.cosh(values["a"] - 6)

    found = tune(loss, {"a": Parameter(STEPS, 1), "idle": Parameter(STEPS, 4)})
    assert found.values == {"a": 6, "idle": 4}
    assert len(tried) == len(set(tried))


def test_nothing_to_tune_has_a_loss():
    assert tune(lambda values: 2.5, {}).loss == 2.5
