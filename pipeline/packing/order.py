"""The order of an epoch, and which part of a batch is whose: arithmetic on (seed, step, rank), no state.

An epoch's permutation is computed place by place, so that 10^9 groups cost no sort and no memory: a generalised Feistel network over a
rectangle of numbers just larger than the count, walked again from where it leaves the count (Black & Rogaway 2002, "Ciphers with arbitrary
finite domains", section 5). Its round function is the finaliser of splitmix64, as in `draws`.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from pipeline.packing.segments import Ints

TURNS = 8
"""Two rounds each. With 8, all orders of up to six numbers are as frequent as one another, as far as 60 000 draws can tell; with 6 they are not."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def permutation(count: int, seed: int, epoch: int) -> Ints:
    """int64 [count], a pure function of its arguments."""
    return Order(count, seed).at(np.arange(epoch * count, (epoch + 1) * count))


def share(count: int, rank: int, world: int) -> tuple[int, int]:
    """The contiguous part [first, last) of `count` things that is `rank`'s; parts differ by at most one."""
    return count * rank // world, count * (rank + 1) // world


class Order:
    """An endless sequence of `count` numbers: epoch after epoch, each shuffled anew."""

    def __init__(self, count: int, seed: int):
        self._count, self._seed = np.uint64(count), np.uint64(seed % 2**64)
        self._width = np.uint64(math.isqrt(max(count - 1, 0)) + 1)

    def at(self, positions: Ints) -> Ints:
        """The numbers at those positions of the sequence; a batch may run over an epoch's end."""
        return _shuffled(positions, self._count, self._seed, self._width)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _shuffled(positions, count, seed, width):  # type: ignore[no-untyped-def]
    height = (count + width - np.uint64(1)) // width
    numbers = np.empty_like(positions)
    for i in range(len(positions)):
        position = np.uint64(positions[i])
        epoch, number = position // count, position % count
        key = _mix(_mix(seed + _GOLDEN) ^ epoch)
        walking = True
        while walking:
            row, column = number // width, number % width
            for turn in range(TURNS):
                turn_key = key + np.uint64(turn) * _GOLDEN
                row = _rotated(row, _mix(turn_key ^ column), height)
                column = _rotated(column, _mix(~turn_key ^ row), width)
            number = row * width + column
            walking = number >= count
        numbers[i] = np.int64(number)
    return numbers


@numba.njit(cache=True, nogil=True)
def _rotated(place, bits, size):  # type: ignore[no-untyped-def]
    """`place` moved on by `bits` scaled to [0, size), around the end; size is below 2^32."""
    moved = place + ((bits >> np.uint64(32)) * size >> np.uint64(32))
    return moved - size if moved >= size else moved


@numba.njit(cache=True, nogil=True)
def _mix(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLY_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLY_2
    return z ^ (z >> np.uint64(31))
