"""How well a task is done, by the measures that GLUE and SQuAD use (Wang et al. 2019; Rajpurkar et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from sklearn import metrics
from torch import nn

from pipeline.objectives.classify import INPUTS
from pipeline.tasks import questions, squad
from pipeline.tasks.batches import TaskBatches
from pipeline.tasks.glue import MISMATCHED
from pipeline.tasks.questions import QuestionTask, Windows
from pipeline.tasks.task import AnyTask, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metrics in their order. predictions, labels: [N], numbers of classes, or the numbers predicted.

    f1 is that of label 1 where there are two, else the mean over labels. A correlation with numbers that are all the same is 0.
    """
    average = "binary" if len(task.labels) == 2 else "macro"
    measures: dict[str, Callable[..., float]] = {
        "accuracy": metrics.accuracy_score,
        "f1": partial(metrics.f1_score, average=average, zero_division=0),
        "matthews": metrics.matthews_corrcoef,
        "pearson": partial(_correlation, stats.pearsonr),
        "spearman": partial(_correlation, stats.spearmanr),
    }
    return {metric: float(measures[metric](labels, predictions)) for metric in task.metrics}


def _correlation(of: Callable[..., Any], labels: np.ndarray, predictions: np.ndarray) -> float:
    return of(labels, predictions).statistic if np.ptp(predictions) > 0 and np.ptp(labels) > 0 else 0.0


@torch.no_grad()
def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: AnyTask, split: str, batch_size: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """The scores of a model on a split; of MNLI also those on the mismatched development split, as `accuracy_mismatched`.

    The model's output has `logits` [B, labels], or [B, 1] in a regression, or `start_logits` and `end_logits` [B, L] for questions.
    The model is put on the device and into evaluation mode. Rows are taken by length, which saves padding.
    """
    model = model.to(device).eval()
    found = _evaluate(model, tokenizer, task, split, batch_size, device)
    if MISMATCHED in task.splits and split != "train":
        others = _evaluate(model, tokenizer, task, MISMATCHED, batch_size, device)
        found |= {f"{metric}_{MISMATCHED}": value for metric, value in others.items()}
    return found


def _evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: AnyTask, split: str, batch_size: int, device: torch.device | str
) -> dict[str, float]:
    batches = TaskBatches(task.splits[split], tokenizer, task, batch_size, seed=0)
    found = outputs(model, batches, device)
    if isinstance(task, QuestionTask):
        return squad.score(_answers(found, batches, task, split), task.splits[split])
    labels = batches.encoded.targets["labels"]
    predictions = np.empty_like(labels)
    for numbers, output in found:
        predictions[numbers] = (output.logits[:, 0] if task.regression else output.logits.argmax(-1)).float().cpu().numpy()
    return score(task, predictions, labels)


def outputs(model: nn.Module, batches: TaskBatches, device: torch.device | str, **options: Any) -> Iterator[tuple[np.ndarray, Any]]:
    """Numbers of rows, and the model's output for them, until all had their turn, the shortest first."""
    by_length = np.argsort(batches.lengths, kind="stable")
    for first in range(0, len(by_length), batches.batch_size):
        numbers = by_length[first : first + batches.batch_size]
        rows = batches.rows(numbers)
        yield numbers, model(**{name: torch.from_numpy(rows[name]).to(device) for name in INPUTS if name in rows}, **options)


def _answers(outputs: Iterator[tuple[np.ndarray, Any]], batches: TaskBatches, task: QuestionTask, split: str) -> list[str]:
    """The best answer to each question of a split, cut from its context, out of all its windows."""
    windows = batches.encoded
    assert isinstance(windows, Windows)
    best = np.full(len(task.splits[split]), -np.inf)
    answers = [""] * len(best)
    for numbers, output in outputs:
        start, end = (logits.float().cpu().numpy() for logits in (output.start_logits, output.end_logits))
        places = [windows.offsets[number] for number in numbers]
        inside = np.zeros(start.shape, dtype=bool)
        for row, offsets in enumerate(places):
            inside[row, : len(offsets)] = offsets[:, 0] >= 0
        for row, (value, first, last) in enumerate(zip(*questions.best_spans(start, end, inside, task.max_answer), strict=True)):
            question = windows.question[numbers[row]]
            if value > best[question]:
                best[question] = value
                answers[question] = task.splits[split][question].context[places[row][first, 0] : places[row][last, 1]]
    return answers
