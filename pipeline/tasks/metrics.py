"""How well a task is done, by the measures GLUE uses (Wang et al. 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import stats
from sklearn import metrics
from torch import nn

from pipeline.objectives.classify import INPUTS
from pipeline.tasks.batches import TaskBatches
from pipeline.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def score(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's metric, first, and the others usual beside it: accuracy of any classification, both correlations of a regression.

    predictions, labels: [N], numbers of classes, or the numbers predicted. f1 is that of label 1 where there are two, else the
    mean over labels. A correlation with predictions that are all the same is 0.
    """
    found: dict[str, float] = {}
    if task.regression:
        varied = np.ptp(predictions) > 0 and np.ptp(labels) > 0
        found["pearson"] = float(stats.pearsonr(predictions, labels).statistic) if varied else 0.0
        found["spearman"] = float(stats.spearmanr(predictions, labels).statistic) if varied else 0.0
    else:
        found["accuracy"] = float(metrics.accuracy_score(labels, predictions))
        if task.metric == "f1":
            average = "binary" if len(task.labels) == 2 else "macro"
            found["f1"] = float(metrics.f1_score(labels, predictions, average=average, zero_division=0))
        if task.metric == "matthews":
            found["matthews"] = float(metrics.matthews_corrcoef(labels, predictions))
    return {task.metric: found[task.metric], **found}


@torch.no_grad()
def evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, split: str, batch_size: int, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """The scores of a model on a split. Its output's `logits` are [B, labels], or [B, 1] in a regression.

    The model is put on the device and into evaluation mode. Examples are taken by length, which saves padding.
    """
    model = model.to(device).eval()
    batches = TaskBatches(task.splits[split], tokenizer, task, batch_size, seed=0)
    by_length = np.argsort(batches.lengths, kind="stable")
    predictions = np.empty(len(by_length), dtype=batches.labels.dtype)
    for first in range(0, len(by_length), batch_size):
        numbers = by_length[first : first + batch_size]
        rows = batches.rows(numbers)
        logits = model(**{name: torch.from_numpy(rows[name]).to(device) for name in INPUTS if name in rows}).logits
        predictions[numbers] = (logits[:, 0] if task.regression else logits.argmax(-1)).float().cpu().numpy()
    return score(task, predictions, batches.labels)
