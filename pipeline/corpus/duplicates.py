"""Near-duplicate removal: MinHash signatures of word shingles (Broder 1997), banded locality-sensitive hashing to find candidates.

Two documents are compared only when they agree on a whole band of their signatures; the share of equal signature values then
estimates the Jaccard similarity of their sets of 5-word shingles, with a standard error of at most 0.045. Costs 512 bytes for the
signature and about 2.5 kB for the bands of each document kept, whatever its length, and 0.1-0.2 ms of time.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

SHINGLE = 5
"""Words."""
PERMUTATIONS = 128
RECALL = 0.99
"""Least probability that a pair right at the threshold is compared at all."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
_SEPARATORS = np.zeros(256, dtype=bool)
_SEPARATORS[[9, 10, 11, 12, 13, 32]] = True
_draw = np.random.Generator(np.random.Philox(20_000))
_MULTIPLIERS = _draw.integers(0, 1 << 32, PERMUTATIONS, dtype=np.uint32) | np.uint32(1)
_OFFSETS = _draw.integers(0, 1 << 32, PERMUTATIONS, dtype=np.uint32)
_AGAIN = _draw.integers(0, 1 << 32, PERMUTATIONS, dtype=np.uint32) | np.uint32(1)
_POSITION = _draw.integers(0, 1 << 63, SHINGLE, dtype=np.uint64) | np.uint64(1)
_BLOCK = 2048
"""Shingles hashed at a time: 256 kB of intermediate values stays in the processor's cache."""


class Duplicates:
    """The documents seen so far. `first_seen(text)` in order: the answers depend on nothing else."""

    def __init__(self, threshold: float) -> None:
        """threshold: estimated Jaccard similarity, in (0, 1], from which a document is a duplicate of an earlier one."""
        self._threshold = threshold
        self._rows = _rows_per_band(threshold)
        self._exact: set[bytes] = set()
        self._bands: list[dict[bytes, int]] = [{} for _ in range(PERMUTATIONS // self._rows)]
        self._signatures = np.empty((1024, PERMUTATIONS), dtype=np.uint32)
        self._kept = 0

    def first_seen(self, text: str) -> bool:
        """Whether nothing like this text came before; if so it is remembered."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._exact:
            return False
        self._exact.add(digest)
        own = signature(text)
        keys = [own[start : start + self._rows].tobytes() for start in range(0, len(self._bands) * self._rows, self._rows)]
        candidates = sorted({band[key] for band, key in zip(self._bands, keys, strict=True) if key in band})
        if candidates and (self._signatures[candidates] == own).mean(axis=1).max() >= self._threshold:
            return False
        if self._kept == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[self._kept] = own
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, self._kept)
        self._kept += 1
        return True


def signature(text: str) -> npt.NDArray[np.uint32]:
    """MinHash values [128] of the set of 5-word shingles of a text, in lower case; of all its words where there are fewer."""
    words = _word_hashes(text.lower().encode("utf-8", "surrogatepass"))
    width = min(SHINGLE, len(words))
    if width == 0:
        return np.zeros(PERMUTATIONS, dtype=np.uint32)
    count = len(words) - width + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for position in range(width):
        mixed += words[position : position + count] * _POSITION[position]
    shingles = (_mix(mixed) >> np.uint64(32)).astype(np.uint32)
    lowest = np.full(PERMUTATIONS, 0xFFFFFFFF, dtype=np.uint32)
    for start in range(0, count, _BLOCK):
        permuted = shingles[None, start : start + _BLOCK] ^ _OFFSETS[:, None]
        permuted *= _MULTIPLIERS[:, None]
        permuted ^= permuted >> np.uint32(16)
        permuted *= _AGAIN[:, None]
        np.minimum(lowest, permuted.min(axis=1), out=lowest)
    return lowest


def _word_hashes(text: bytes) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each word: differences of prefix sums of byte * base**position, with the word's position divided out."""
    data = np.frombuffer(text, dtype=np.uint8)
    separator = np.concatenate([[True], _SEPARATORS[data], [True]])
    edges = np.flatnonzero(separator[1:] != separator[:-1])
    starts, ends = edges[0::2], edges[1::2]
    powers, inverses = _powers(len(data))
    sums = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[: len(data)], out=sums[1:])
    return _mix((sums[ends] - sums[starts]) * inverses[starts])


_table = (np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64))


def _powers(count: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """base**i and base**-i modulo 2**64 for at least i < count; kept, since every document needs them."""
    global _table
    if len(_table[0]) < count:
        size = 1 << count.bit_length()
        inverse = np.uint64(pow(int(_BASE), -1, 1 << 64))
        powers, inverses = (np.cumprod(np.concatenate([[np.uint64(1)], np.full(size - 1, factor)])) for factor in (_BASE, inverse))
        _table = (powers, inverses)
    return _table


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _rows_per_band(threshold: float) -> int:
    """The most rows (fewest false candidates) with which a pair at the threshold shares a band with probability RECALL."""
    fits = [rows for rows in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL]
    return max(fits, default=1)
