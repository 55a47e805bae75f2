from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.packing.order import Order, permutation


@settings(deadline=None)  # the first call compiles
@given(count=st.integers(0, 5000), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**31))
def test_every_number_comes_once(count, seed, epoch):
    assert (np.sort(permutation(count, seed, epoch)) == np.arange(count)).all()


def test_the_order_is_the_same_on_every_machine():
    assert permutation(10, 1, 0).tolist() == [7, 8, 9, 2, 1, 5, 0, 3, 4, 6]
    assert Order(10**12, 7).at(np.array([0, 10**12, 5 * 10**12 + 3])).tolist() == [376742487640, 352733539316, 810701804244]


def test_all_orders_are_as_frequent_as_one_another():
    for draws in (((seed, 0) for seed in range(12000)), ((3, epoch) for epoch in range(12000))):
        seen = Counter(tuple(permutation(5, *draw)) for draw in draws)
        chi_square = sum((seen[order] - 100) ** 2 / 100 for order in permutations(range(5)))
        assert chi_square < 119 + 5 * (2 * 119) ** 0.5


def test_neighbours_and_epochs_have_nothing_to_do_with_one_another():
    count = 100_000
    first, second = permutation(count, 1, 0), permutation(count, 1, 1)
    for one, other in ((first[:-1], first[1:]), (first, second), (first, np.arange(count)), (first, permutation(count, 2, 0))):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / count**0.5
        assert (one == other).sum() < 10


def test_a_batch_may_run_over_an_epochs_end():
    order = Order(7, 4)
    expected = np.concatenate([permutation(7, 4, epoch) for epoch in range(3)])
    assert order.at(np.arange(5, 16)).tolist() == expected[5:16].tolist()
