"""Questions answered by a span of a text: the task, its windows, and answers out of a model's scores.

A context that is too long is cut into windows that overlap; each is a row with the question before it (Devlin et al. 2019, section 4.2,
and BERT's run_squad). Among the windows of a question the answer with the best sum of start and end scores is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from pipeline import artifacts
from pipeline.tasks import squad
from pipeline.tasks.encoded import Encoded, row_of, told_apart
from pipeline.tasks.settings import MAX_QUESTION, SquadSettings
from pipeline.tasks.squad import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000
"""Questions tokenised at a time: what the tokenizer gives back is many times larger than what is kept."""


@dataclass(frozen=True)
class Windows(Encoded):
    """question: int64 [rows], the number of the question a window is of. offsets: for each window int32 [tokens, 2], the characters of
    the context that a token stands for, -1 where it is none of the context's.

    targets: `start_positions`, `end_positions` int64 [rows]: the answer's first and last token, or [cls] where the window has not all of it.
    """

    question: np.ndarray
    offsets: list[np.ndarray]


@dataclass(frozen=True)
class QuestionTask:
    """splits: `train`, `dev`, `test`; doc_stride, max_answer: see `SquadSettings`."""

    splits: dict[str, list[Question]]
    max_length: int
    doc_stride: int
    max_answer: int

    head: ClassVar[Literal["qa"]] = "qa"
    metric: ClassVar[str] = "f1"
    remarks: ClassVar[tuple[str, ...]] = ()

    def save(self, path: Path) -> None:
        """Keep the task as it was used; each context once."""
        contexts: dict[str, int] = {}
        splits = {
            split: [
                [question.id, question.text, contexts.setdefault(question.context, len(contexts)), question.answers, question.answer_starts]
                for question in questions
            ]
            for split, questions in self.splits.items()
        }
        shape = {"max_length": self.max_length, "doc_stride": self.doc_stride, "max_answer": self.max_answer}
        artifacts.write_json(path, {"kind": "questions", **shape, "contexts": list(contexts), "splits": splits})

    @classmethod
    def of(cls, kept: dict[str, Any]) -> QuestionTask:
        """What `save` wrote."""
        contexts = kept["contexts"]
        splits = {
            split: [Question(id, text, contexts[context], tuple(answers), tuple(starts)) for id, text, context, answers, starts in questions]
            for split, questions in kept["splits"].items()
        }
        return cls(splits, kept["max_length"], kept["doc_stride"], kept["max_answer"])

    def encode(self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> Windows:
        """The windows of questions, in order. The tokenizer is a fast one, which knows the characters its tokens stand for."""
        chunks = [range(first, min(first + CHUNK, len(questions))) for first in range(0, len(questions), CHUNK)]
        rows = [row for chunk in chunks for row in self._windows(questions, chunk, tokenizer)]
        tokens, types, numbers, offsets, spans = (list(column) for column in zip(*rows, strict=True))
        starts, ends = np.array(spans, dtype=np.int64).T
        return Windows(tokens, told_apart(types), {"start_positions": starts, "end_positions": ends}, np.array(numbers), offsets)

    def _windows(self, questions: Sequence[Question], chunk: range, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Any, ...]]:
        """Of each window: tokens, types, the question's number, offsets, and the answer's first and last token."""
        found = tokenizer(
            _cut([questions[number].text for number in chunk], tokenizer),
            [questions[number].context for number in chunk],
            truncation="only_second",
            max_length=self.max_length,
            stride=self.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        for row, place in enumerate(found["overflow_to_sample_mapping"]):
            tokens = row_of(found["input_ids"][row])
            inside = np.array([part == 1 for part in found.sequence_ids(row)])
            offsets = np.where(inside[:, None], np.array(found["offset_mapping"][row], dtype=np.int32), np.int32(-1))
            nowhere = int((tokens == tokenizer.cls_token_id).argmax())
            span = _span(offsets, questions[chunk[place]]) or (nowhere, nowhere)
            yield tokens, row_of(found["token_type_ids"][row]), chunk[place], offsets, span


def load(settings: SquadSettings, length: int) -> QuestionTask:
    """Both files; the development split is also the test split. Raises UserError for files that are not SQuAD 1.1's."""
    splits = {"train": squad.read(settings.train), "dev": squad.read(settings.dev)}
    return QuestionTask({**splits, "test": splits["dev"]}, length, settings.doc_stride, settings.max_answer)


def best_spans(start: np.ndarray, end: np.ndarray, inside: np.ndarray, max_answer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row the span with the best sum of scores, of at most `max_answer` tokens: that sum, its first and its last token, each [B].

    start, end: scores [B, L]; inside: boolean [B, L], the tokens an answer may be of. Exact: all spans are compared, where BERT's script
    pairs the 20 best starts with the 20 best ends.
    """
    start, end = (np.where(inside, scores, -np.inf) for scores in (start, end))
    reach = min(max_answer, start.shape[1])
    ends = np.pad(end, ((0, 0), (0, reach - 1)), constant_values=-np.inf)
    sums = start[:, :, None] + np.lib.stride_tricks.sliding_window_view(ends, reach, axis=1)  # [B, L, reach]
    flat = sums.reshape(len(sums), -1)
    best = flat.argmax(1)
    first = best // reach
    return flat[np.arange(len(flat)), best], first, first + best % reach


def _cut(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Questions of more than MAX_QUESTION tokens end there."""
    offsets = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [text if len(places) <= MAX_QUESTION else text[: places[MAX_QUESTION - 1][1]] for text, places in zip(texts, offsets, strict=True)]


def _span(places: np.ndarray, question: Question) -> tuple[int, int] | None:
    """First and last token of the first of the right answers; None where the window does not have all of it. places: as `Windows.offsets`."""
    answer, start = question.answers[0], question.answer_starts[0]
    end = start + len(answer.rstrip())
    start += len(answer) - len(answer.lstrip())
    window = places[places[:, 0] >= 0]
    covering = np.flatnonzero((places[:, 0] < end) & (places[:, 1] > start))
    if not len(covering) or window[0, 0] > start or window[-1, 1] < end:
        return None
    return int(covering[0]), int(covering[-1])
