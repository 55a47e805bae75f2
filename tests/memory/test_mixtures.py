"""Distributions of memories and vocabulary: against the formulas, in plain numbers; and each sums to one."""

import math

import numpy as np
import pytest

from pipeline.memory.distribution import Place, log_distribution
from pipeline.memory.kinds import JOINT, LINEAR, Memory
from pipeline.memory.mixtures import PARAMETERS, parameters, predict

VALUES = {
    "temperature": 0.7, "bias": 1.5, "store_temperature": 1.35, "store_bias": 0.5, "neighbours": 4,
    "knn_temperature": 0.4, "knn_weight": 0.3, "cache_temperature": 0.25, "cache_weight": 0.2,
}  # fmt: skip
LOGITS = np.array([0.3, -1.0, 2.0, 0.1, 0.7])
LOCAL = (np.array([1.0, 0.2, -0.5]), np.array([2, 4, 2]))
LONG = (np.array([2.0, 1.1]), np.array([0, 2]))
EXTERNAL = (np.array([3.0, 2.0, 1.5, 0.0, -1.0, -np.inf]), np.array([4, 1, 4, 2, 0, -1]))
FULL = Place(LOGITS, {"local": LOCAL, "long": LONG, "external": EXTERNAL})
NOTHING = (np.array([]), np.array([], dtype=np.int64))
NONE_FOUND = (np.array([-np.inf, -np.inf]), np.array([-1, -1]))
EMPTY = Place(LOGITS, {"local": NOTHING, "long": NOTHING, "external": NONE_FOUND})
EVERY = [Memory.of(name) for name in (*JOINT, *LINEAR)]
EVERY += [memory.interpolated() for memory in EVERY if memory.rule == "joint" and "external" in memory]


def mass(entries, temperature, bias=0.0, first=None):
    """exp(score / temperature - bias), summed by token."""
    found = np.zeros(5)
    for score, value in list(zip(*entries, strict=True))[:first]:
        if value >= 0:
            found[value] += math.exp(score / temperature - bias)
    return found


@pytest.mark.parametrize("memory", EVERY, ids=lambda memory: memory.name)
@pytest.mark.parametrize("place", [FULL, EMPTY], ids=["full", "empty"])
def test_every_distribution_sums_to_one(memory, place):
    assert set(parameters(memory)) <= set(VALUES)
    assert np.exp(log_distribution(memory, place, VALUES)).sum() == pytest.approx(1, abs=1e-12)


def test_the_joint_softmax_is_one_over_vocabulary_and_entries_with_biases_outside_the_window():
    memory = Memory.of("local+long+external")
    vocabulary = np.exp(LOGITS)
    entries = mass(LOCAL, 0.7) + mass(LONG, 0.7, 1.5) + mass(EXTERNAL, 1.35, 0.5, 4)
    total = (vocabulary + entries).sum()
    np.testing.assert_allclose(np.exp(log_distribution(memory, FULL, VALUES)), (vocabulary + entries) / total)
    assert predict(memory, FULL, VALUES).share.tolist() == pytest.approx([entries.sum() / total])


def test_the_target_absent_from_memory_costs_the_memorys_share():
    found = predict(Memory.of("local"), FULL, VALUES)
    plain = predict(Memory.of("none"), FULL, VALUES)
    absent = 1
    z_memory, z_vocabulary = mass(LOCAL, 0.7).sum(), np.exp(LOGITS).sum()
    assert found.log_probability[absent] == pytest.approx(plain.log_probability[absent] - math.log(1 + z_memory / z_vocabulary))


def test_the_interpolated_form_mixes_the_joint_one_with_the_stores_own():
    joint = Memory.of("local+external")
    one, store = np.exp(log_distribution(joint, FULL, VALUES)), mass(EXTERNAL, 0.4, first=4)
    np.testing.assert_allclose(np.exp(log_distribution(joint.interpolated(), FULL, VALUES)), 0.7 * one + 0.3 * store / store.sum())
    shares = [predict(memory, FULL, VALUES).share[0] for memory in (joint, joint.interpolated())]
    assert shares[1] == pytest.approx(0.7 * shares[0] + 0.3)


def test_cache_and_knn_are_a_three_way_mean_of_distributions():
    model, cache, store = np.exp(LOGITS), mass(LOCAL, 0.25) + mass(LONG, 0.25), mass(EXTERNAL, 0.4, first=4)
    model, cache, store = (found / found.sum() for found in (model, cache, store))
    for name, weights in (("cache+long", (0.8, 0.2, 0)), ("knn+cache+long", (0.7 * 0.8, 0.7 * 0.2, 0.3))):
        expected = weights[0] * model + weights[1] * cache + weights[2] * store
        np.testing.assert_allclose(np.exp(log_distribution(Memory.of(name), FULL, VALUES)), expected)
        assert predict(Memory.of(name), FULL, VALUES).share[0] == pytest.approx(1 - weights[0])


@pytest.mark.parametrize("memory", EVERY, ids=lambda memory: memory.name)
def test_an_empty_memory_leaves_the_model_as_it_is(memory):
    plain = predict(Memory.of("none"), EMPTY, VALUES)
    np.testing.assert_array_equal(predict(memory, EMPTY, VALUES).log_probability, plain.log_probability)
    assert not predict(memory, EMPTY, VALUES).share.any()


def test_weights_and_biases_of_nothing_switch_off():
    off = VALUES | {"knn_weight": 0.0, "cache_weight": 0.0}
    np.testing.assert_allclose(log_distribution(Memory.of("knn+cache"), FULL, off), log_distribution(Memory.of("none"), FULL, off))
    joint = Memory.of("long+external")
    np.testing.assert_allclose(log_distribution(joint.interpolated(), FULL, off), log_distribution(joint, FULL, off))


def test_grids_rise_and_hold_what_they_begin_with():
    for parameter in PARAMETERS.values():
        assert list(parameter.grid) == sorted(set(parameter.grid))
        assert parameter.start in parameter.grid


def test_memories_are_named_by_their_parts_in_any_order_and_nothing_else_is_one():
    assert Memory.of("long+local").name == "local+long"
    assert Memory.of("cache+knn").rule == "linear"
    for wrong in (
        "",
        "lokal",
        "local+local",
        "knn+local",
        "none+local",
        "cache+external",
        "local+long+external+cache",
        "local+external, interpolated",
    ):
        with pytest.raises(ValueError, match=r"no memory is called .*local\+long\+external.*knn\+cache\+long"):
            Memory.of(wrong)
