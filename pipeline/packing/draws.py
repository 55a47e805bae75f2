"""Counter-based draws about data: the value depends on what it is for, never on who draws it or what was drawn before.

A counter is mixed by rounds of the splitmix64 finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
generators"; constants by Stafford, variant 13). All in wrapping int64, so a CPU and a GPU agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLY_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = _signed(0x94D049BB133111EB)


def uniform(seed: int, step: int, segment: Tensor, length: int, stream: int) -> Tensor:
    """float32 [B, length] in [0, 1), multiples of 2^-24, on the device of `segment`.

    segment: int64 [B], the rows' numbers in the plan (or of a task's examples); stream: tells apart the draws of one row and step.
    """
    return _shift(_bits(seed, step, segment, length, stream), 40).to(torch.float32) * 2.0**-24


def integers(seed: int, step: int, segment: Tensor, length: int, stream: int, high: int) -> Tensor:
    """int64 [B, length] in [0, high); the bias of the remainder is below high / 2^63."""
    return _shift(_bits(seed, step, segment, length, stream), 1) % high


def _bits(seed: int, step: int, segment: Tensor, length: int, stream: int) -> Tensor:
    """64 random bits for each position: a splitmix64 sequence a row, its state hashed from (seed, step, stream, segment)."""
    state = torch.zeros((), dtype=torch.int64, device=segment.device)
    for part in (seed, step, stream):
        state = _mix((state ^ _signed(part)) + _GOLDEN)
    rows = _mix((segment.to(torch.int64) ^ state) + _GOLDEN)
    positions = torch.arange(1, length + 1, dtype=torch.int64, device=segment.device)
    return _mix(rows[:, None] + positions * _GOLDEN)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MULTIPLY_1
    z = (z ^ _shift(z, 27)) * _MULTIPLY_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own copies the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
