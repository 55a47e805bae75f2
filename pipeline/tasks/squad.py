"""SQuAD 1.1 (Rajpurkar et al. 2016): its files, and the scores of its official script."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.tasks.tables import text_of


@dataclass(frozen=True)
class Question:
    """answers: texts that are right, each a span of the context; answer_starts: the character each begins at."""

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    answer_starts: tuple[int, ...]


def read(path: str | Path) -> list[Question]:
    """All questions of a file, in order. Questions of one paragraph share its string.

    Raises UserError naming the file and the question for what is not SQuAD 1.1: a question without an answer, or one that is not in its context.
    """
    path = Path(path)
    try:
        content = json.loads(text_of(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    try:
        questions = [_question(path, context, entry) for context, entry in _entries(content)]
    except (KeyError, TypeError, AttributeError) as error:
        layout = '{"data": [{"paragraphs": [{"context": ..., "qas": [{"id", "question", "answers": [{"text", "answer_start"}]}]}]}]}'
        raise UserError(f"{path}: not in SQuAD's layout ({error!r}); expected {layout}") from None
    if not questions:
        raise UserError(f"{path}: no questions in it; give a file of SQuAD 1.1")
    return questions


def _entries(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                yield paragraph["context"], entry


def _question(path: Path, context: str, entry: dict[str, Any]) -> Question:
    where = f"{path}: question {entry['id']}"
    if entry.get("is_impossible") or not entry["answers"]:
        raise UserError(f"{where} has no answer, as questions of SQuAD 2.0 may; give files of SQuAD 1.1, or take such questions out")
    answers = tuple(answer["text"] for answer in entry["answers"])
    starts = tuple(_place(context, answer["text"], answer["answer_start"], where) for answer in entry["answers"])
    return Question(entry["id"], entry["question"].strip(), context, answers, starts)


def _place(context: str, answer: str, start: int, where: str) -> int:
    """Where an answer begins: where the file says, or, as files are known to be off by a character, the nearest place that has it."""
    if answer.strip() and context.startswith(answer, start):
        return start
    places = [found.start() for found in re.finditer(re.escape(answer), context)] if answer.strip() else []
    if not places:
        raise UserError(f"{where}: its answer {answer!r} is not in the context; correct the file, or take the question out")
    return min(places, key=lambda place: abs(place - start))


def score(predictions: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Means over questions of the best F1 of words, and of the exact match, with any of the right answers; shares of 1, not percent."""
    pairs = list(zip(predictions, questions, strict=True))
    return {
        "f1": float(np.mean([max(word_f1(predicted, answer) for answer in question.answers) for predicted, question in pairs])),
        "exact_match": float(np.mean([any(normal(predicted) == normal(answer) for answer in question.answers) for predicted, question in pairs])),
    }


def normal(answer: str) -> str:
    """An answer as it is compared: lower case, without punctuation, then without articles, single spaces (SQuAD's evaluate-v1.1.py)."""
    bare = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def word_f1(predicted: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words of a predicted answer, as a bag (SQuAD's evaluate-v1.1.py)."""
    found, right = normal(predicted).split(), normal(answer).split()
    same = sum((Counter(found) & Counter(right)).values())
    return 2 * same / (len(found) + len(right)) if same else 0.0
