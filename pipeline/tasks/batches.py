"""Batches of a task's examples: as the plan's loader, arithmetic on the step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.packing.order import Order, share
from pipeline.tasks.encoded import Encoded
from pipeline.tasks.task import AnyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MULTIPLE = 8
"""Rows are padded to a multiple of this, which GPUs' matrix units like."""
SORTED = 16
"""Batches whose examples are sorted by length together; fewer where an epoch has fewer, so that no example meets itself."""


class TaskBatches:
    """Rows of a task's examples in the order of (seed, epoch), `batch_size` a step, without end; ranks take contiguous parts of a global batch.

    All are tokenised once, here, in memory: `encoded` (a row an example, or a window of a question). Rows are padded to the longest of the
    global batch, so that a row does not depend on the number of ranks.
    by_length: examples of each `SORTED` batches are dealt out anew among these, the shortest to one, the longest to another, in random order.
    """

    unit = 1

    def __init__(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, task: AnyTask, batch_size: int, seed: int, *, by_length: bool = False
    ):
        assert examples
        self.batch_size, self.seed, self.max_length, self.by_length = batch_size, seed, task.max_length, by_length
        self.encoded = task.encode(examples, tokenizer)
        self.lengths = np.array([len(tokens) for tokens in self.encoded.tokens])
        self.steps_per_epoch = len(self.lengths) / batch_size
        self._pad = tokenizer.pad_token_id or 0
        self.fingerprint = _digest((batch_size, seed, by_length), self.lengths, self.encoded)
        self._sorted = max(1, min(SORTED, len(self.lengths) // batch_size))
        self._order, self._turns = Order(len(self.lengths), seed), Order(self._sorted, seed)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, np.ndarray]:
        """That rank's rows of global batch `step`: see `rows`.

        Raises UserError when there are more ranks than rows.
        """
        if self.batch_size < world:
            raise UserError(f"{world} ranks share a batch of {self.batch_size} examples: every rank needs one; raise batch_size or use fewer ranks")
        first, last = share(self.batch_size, rank, world)
        numbers = self._numbers(step)
        return self.rows(numbers[first:last], width=int(self.lengths[numbers].max()))

    def first(self, count: int) -> Iterator[dict[str, np.ndarray]]:
        """The first `count` rows of the order, or all where they are fewer, a batch at a time."""
        numbers = self._order.at(np.arange(min(count, len(self.lengths))))
        return (self.rows(numbers[start : start + self.batch_size]) for start in range(0, len(numbers), self.batch_size))

    def _numbers(self, step: int) -> np.ndarray:
        """Of the examples of a global batch."""
        if not self.by_length:
            return self._order.at(step * self.batch_size + np.arange(self.batch_size))
        together = self._sorted * self.batch_size
        numbers = self._order.at(step // self._sorted * together + np.arange(together))
        dealt = numbers[np.argsort(self.lengths[numbers], kind="stable")].reshape(self._sorted, self.batch_size)
        return dealt[self._turns.at(np.array([step]))[0]]

    def rows(self, numbers: np.ndarray, width: int | None = None) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask` and, where the tokenizer tells texts apart by them, `token_type_ids`, int64 [B, L];
        what is to be predicted, [B], by the names that `Encoded.targets` has; `example` int64 [B], the rows' numbers, the counter of draws.

        L is the longest row's length, or `width`, rounded up.
        """
        longest = int(self.lengths[numbers].max()) if width is None else width
        width = min(-(-longest // MULTIPLE) * MULTIPLE, max(self.max_length, longest))
        inside = np.arange(width) < self.lengths[numbers, None]
        rows = {"input_ids": self._padded(self.encoded.tokens, numbers, inside, self._pad), "attention_mask": inside.astype(np.int64)}
        if self.encoded.types is not None:
            rows["token_type_ids"] = self._padded(self.encoded.types, numbers, inside, 0)
        return {**rows, **{name: values[numbers] for name, values in self.encoded.targets.items()}, "example": numbers}

    def _padded(self, values: list[np.ndarray], numbers: np.ndarray, inside: np.ndarray, padding: int) -> np.ndarray:
        padded = np.full(inside.shape, padding, dtype=np.int64)
        padded[inside] = np.concatenate([values[number] for number in numbers])
        return padded


def _digest(order: tuple[int, int, bool], lengths: np.ndarray, encoded: Encoded) -> str:
    digest = hashlib.sha256(repr((*order, list(encoded.targets))).encode())
    for array in (lengths, np.concatenate(encoded.tokens), *encoded.targets.values()):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
