"""What a task's examples become: rows of tokens, and what is to be predicted of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Encoded:
    """tokens: a list a row. types: which text each token is of, None where the tokenizer does not tell texts apart by them.
    targets: by name, an array with a value a row.
    """

    tokens: list[list[int]]
    types: list[list[int]] | None
    targets: dict[str, np.ndarray]


def told_apart(types: list[list[int]]) -> list[list[int]] | None:
    """Token types that are all zero are what a model assumes, and one without types may not take them: None."""
    return types if any(map(any, types)) else None
