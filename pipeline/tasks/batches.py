"""Batches of a task's examples: as the plan's loader, arithmetic on the step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.packing.order import Order, share
from pipeline.tasks.task import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MULTIPLE = 8
"""Rows are padded to a multiple of this, which GPUs' matrix units like."""


class TaskBatches:
    """Examples in the order of (seed, epoch), `batch_size` a step, without end; ranks take contiguous parts of a global batch.

    All are tokenised once, here, in memory. Rows are padded to the longest of the global batch, so that a row does not depend on the
    number of ranks. Inputs beyond the task's `max_length` are cut, the longer text first.
    """

    unit = 1

    def __init__(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: Task, batch_size: int, seed: int):
        assert examples
        self.batch_size, self.seed, self.max_length = batch_size, seed, task.max_length
        self.steps_per_epoch = len(examples) / batch_size
        pairs = [example.text_pair for example in examples] if examples[0].text_pair is not None else None
        encoded = tokenizer([example.text for example in examples], pairs, truncation=True, max_length=task.max_length, return_token_type_ids=True)
        self._tokens: list[list[int]] = encoded["input_ids"]
        self._types: list[list[int]] | None = encoded["token_type_ids"]
        if not any(map(any, self._types)):  # all zero is what a model assumes, and one without types may not take them
            self._types = None
        self._pad = tokenizer.pad_token_id or 0
        self.labels = np.array([example.label for example in examples], dtype=np.float32 if task.regression else np.int64)
        self.lengths = np.array([len(tokens) for tokens in self._tokens])
        self.fingerprint = _digest(batch_size, seed, self._tokens, self.labels.tolist())
        self._order = Order(len(examples), seed)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, np.ndarray]:
        """That rank's rows of global batch `step`: see `rows`.

        Raises UserError when there are more ranks than rows.
        """
        if self.batch_size < world:
            raise UserError(f"{world} ranks share a batch of {self.batch_size} examples: every rank needs one; raise batch_size or use fewer ranks")
        first, last = share(self.batch_size, rank, world)
        numbers = self._order.at(step * self.batch_size + np.arange(self.batch_size))
        return self.rows(numbers[first:last], width=int(self.lengths[numbers].max()))

    def rows(self, numbers: np.ndarray, width: int | None = None) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask` and, where the tokenizer tells texts apart by them, `token_type_ids`, int64 [B, L];
        `labels` int64 [B], or float32 in a regression; `example` int64 [B], the examples' numbers, the counter of draws.

        L is the longest row's length, or `width`, rounded up.
        """
        longest = int(self.lengths[numbers].max()) if width is None else width
        width = min(-(-longest // MULTIPLE) * MULTIPLE, max(self.max_length, longest))
        inside = np.arange(width) < self.lengths[numbers, None]
        rows = {"input_ids": self._padded(self._tokens, numbers, inside, self._pad), "attention_mask": inside.astype(np.int64)}
        if self._types is not None:
            rows["token_type_ids"] = self._padded(self._types, numbers, inside, 0)
        return {**rows, "labels": self.labels[numbers], "example": numbers}

    def _padded(self, values: list[list[int]], numbers: np.ndarray, inside: np.ndarray, padding: int) -> np.ndarray:
        padded = np.full(inside.shape, padding, dtype=np.int64)
        padded[inside] = np.concatenate([values[number] for number in numbers])
        return padded


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
