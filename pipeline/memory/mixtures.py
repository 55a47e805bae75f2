"""How memories and the vocabulary make one distribution: TRIME's joint softmax, its interpolation, the continuous cache, kNN-LM.

Each formula needs, of a memory, two sums only: of exp(score) over all its entries, and over those whose value is the target. `Evidence`
gives their logarithms, so the same formulas serve whole texts (`statistics`) and, with every token in turn as the target, a whole
distribution (`distribution`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.memory.kinds import Memory, Part

Array = NDArray[np.floating]
Pair = tuple[Array, Array]
"""log sum exp of the scores of all entries, and of those whose value is the target; -inf where there are none."""

Values = Mapping[str, float]
"""Values of the parameters, by name."""


class Evidence(Protocol):
    """partition [n]: log sum exp of the vocabulary's scores; target [n]: the target's score. Both broadcast against `pair`."""

    @property
    def partition(self) -> Array: ...

    @property
    def target(self) -> Array: ...

    def pair(self, part: Part, temperature: float, neighbours: int | None = None) -> Pair:
        """The pair of a part, its scores divided by the temperature; of the store, its nearest `neighbours` entries."""


@dataclass(frozen=True)
class Parameter:
    """A value that is tuned: its grid, where it begins, and the ends of its grid at which it may lie without a warning.

    A weight or a bias of 0 switches something off, and the largest k is what the search was allowed to cost: beyond these lies nothing.
    """

    grid: tuple[float, ...]
    start: float
    natural: tuple[float, ...] = ()


_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
_BIASES = tuple(step / 2 for step in range(17))

PARAMETERS = {
    "temperature": Parameter((0.5, 0.6, 0.7, 0.85, 0.93, 1.0, 1.07, 1.15, 1.25, 1.35, 1.6, 2.0, 2.5, 3.2, 4.0), 1.0),
    "bias": Parameter(_BIASES, 0.0, (0.0,)),
    "store_temperature": Parameter((0.7, 0.85, 1.0, 1.15, 1.35, 1.6, 2.0, 2.5, 3.2, 4.0, 5.6, 8.0), 1.0),
    "store_bias": Parameter(_BIASES, 0.0, (0.0,)),
    "knn_temperature": Parameter((0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25, 0.33, 0.4, 0.5, 0.67, 0.85, 1.0, 1.35, 2.0), 0.4),
    "knn_weight": Parameter(_WEIGHTS, 0.25, (0.0,)),
    "cache_temperature": Parameter((0.1, 0.14, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.25, 1.6, 2.5, 4.0), 0.5),
    "cache_weight": Parameter(_WEIGHTS, 0.25, (0.0,)),
}
"""All but `neighbours`, whose grid is the recipe's `evaluate.external.k`."""


@dataclass(frozen=True)
class Prediction:
    """log_probability of the target; share: the memory's share of the probability of all tokens. Both [n]."""

    log_probability: Array
    share: Array


def parameters(memory: Memory) -> tuple[str, ...]:
    """Names of the parameters that a memory has, besides those of the joint softmax that its interpolation takes over."""
    if memory.rule == "linear":
        cache = ("cache_temperature", "cache_weight") if "local" in memory else ()
        return (*cache, *(("knn_temperature", "knn_weight", "neighbours") if "external" in memory else ()))
    if memory.rule == "interpolated":
        return ("knn_temperature", "knn_weight")
    own = ("temperature",) if "local" in memory or "long" in memory else ()
    long = ("bias",) if "long" in memory else ()
    return (*own, *long, *(("store_temperature", "store_bias", "neighbours") if "external" in memory else ()))


def temperatures(memory: Memory) -> dict[Part, tuple[str, ...]]:
    """Which temperatures, by name, divide the scores of each part."""
    if memory.rule == "linear":
        return {part: ("knn_temperature",) if part == "external" else ("cache_temperature",) for part in memory.parts}
    store = ("store_temperature", "knn_temperature") if memory.rule == "interpolated" else ("store_temperature",)
    return {part: store if part == "external" else ("temperature",) for part in memory.parts}


def predict(memory: Memory, evidence: Evidence, values: Values) -> Prediction:
    """log P(target) with that memory."""
    if memory.rule == "linear":
        return _linear(memory, evidence, values)
    joint = _joint(memory, evidence, values)
    return _mixed(joint, _knn(evidence, values), values["knn_weight"]) if memory.rule == "interpolated" else joint


def _joint(memory: Memory, evidence: Evidence, values: Values) -> Prediction:
    """TRIME, Eq. 6: one softmax over the vocabulary and every entry, at a temperature for the entries and another for the store's.

    Besides the paper, `bias` and `store_bias` come off the scores of what is not the own window: they give back its share to a model that
    was trained with a smaller memory.
    """
    everything, target = evidence.partition, evidence.target
    for part in memory.parts:
        if part == "external":
            of_all, of_target = evidence.pair(part, values["store_temperature"], int(values["neighbours"]))
        else:
            of_all, of_target = evidence.pair(part, values["temperature"])
        bias = {"local": 0.0, "long": values.get("bias", 0.0), "external": values.get("store_bias", 0.0)}[part]
        everything = np.logaddexp(everything, of_all - bias)
        target = np.logaddexp(target, of_target - bias)
    return Prediction(target - everything, -np.expm1(evidence.partition - everything))


def _linear(memory: Memory, evidence: Evidence, values: Values) -> Prediction:
    """P = (1 - l) P_lm + l P_cache (Grave et al. 2017, Eq. 4), then kNN-LM's (1 - l') P + l' P_knn (Khandelwal et al. 2020, Eq. 3).

    With both, a three-way mean with the weights (1 - l')(1 - l), (1 - l') l and l'. Where a memory is empty its weight is 0.
    """
    none = evidence.target - evidence.partition
    mixed = Prediction(none, np.zeros_like(none))
    if "local" in memory:
        of_all, of_target = evidence.pair("local", values["cache_temperature"])
        if "long" in memory:
            more_all, more_target = evidence.pair("long", values["cache_temperature"])
            of_all, of_target = np.logaddexp(of_all, more_all), np.logaddexp(of_target, more_target)
        mixed = _mixed(mixed, (of_all, of_target), values["cache_weight"])
    return _mixed(mixed, _knn(evidence, values), values["knn_weight"]) if "external" in memory else mixed


def _knn(evidence: Evidence, values: Values) -> Pair:
    """The store's own distribution (kNN-LM, Eq. 2; TRIME, Eq. 8), at a temperature of its own."""
    return evidence.pair("external", values["knn_temperature"], int(values["neighbours"]))


def _mixed(first: Prediction, second: Pair, weight: float) -> Prediction:
    """(1 - weight) of one distribution and weight of the normalised sums of another; the first alone where those are empty."""
    of_all, of_target = second
    weights = np.where(np.isneginf(of_all), 0.0, weight)
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    normalised = of_target - np.where(np.isneginf(of_all), 0.0, of_all)
    mixed = np.logaddexp(np.log1p(-weights) + first.log_probability, log_weights + normalised)
    return Prediction(mixed, first.share + weights * (1 - first.share))
