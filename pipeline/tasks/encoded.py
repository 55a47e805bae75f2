"""What a task's examples become: rows of tokens, and what is to be predicted of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """tokens: int32 [length], an array a row. types: likewise, which text each token is of; None where the tokenizer does not tell texts
    apart by them. targets: by name, an array with a value a row.
    """

    tokens: list[np.ndarray]
    types: list[np.ndarray] | None
    targets: dict[str, np.ndarray]


def row_of(numbers: Sequence[int]) -> np.ndarray:
    """A row as it is kept: a list would take nine times the memory."""
    return np.array(numbers, dtype=np.int32)


def told_apart(types: list[np.ndarray]) -> list[np.ndarray] | None:
    """Token types that are all zero are what a model assumes, and one without types may not take them: None."""
    return types if any(row.any() for row in types) else None
