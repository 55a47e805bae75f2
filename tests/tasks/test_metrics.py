from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.tasks.metrics import evaluate, score
from pipeline.tasks.task import Example, Task

PREDICTED, TRUE = np.array([1, 1, 0, 1, 0, 0]), np.array([1, 0, 0, 1, 1, 0])  # 2 true positives, 1 false, 1 missed, 2 true negatives


def task(metric, labels=("no", "yes"), **splits):
    return Task(splits, labels, metric, 16)


@pytest.mark.parametrize(("metric", "value"), [("accuracy", 4 / 6), ("f1", 4 / 6), ("matthews", (2 * 2 - 1 * 1) / 9)])
def test_classification_scores_are_those_of_their_definitions(metric, value):
    found = score(task(metric), PREDICTED, TRUE)
    assert found == pytest.approx({metric: value, "accuracy": 4 / 6})
    assert next(iter(found)) == metric


def test_f1_is_the_mean_over_labels_where_there_are_more_than_two():
    found = score(task("f1", ("a", "b", "c")), np.array([0, 0, 1, 2]), np.array([0, 1, 1, 2]))
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_correlations_are_linear_and_by_rank():
    labels = np.array([0.0, 1.0, 2.0, 3.0])
    found = score(task("spearman", ()), np.exp(labels), labels)
    expected = np.corrcoef(np.exp(labels), labels)[0, 1]
    assert found == pytest.approx({"spearman": 1.0, "pearson": expected})
    assert next(iter(found)) == "spearman"


def test_a_correlation_with_a_constant_is_0_not_nan():
    found = score(task("pearson", ()), np.zeros(3), np.array([1.0, 2.0, 3.0]))
    assert found == {"pearson": 0.0, "spearman": 0.0}
    assert not any(map(math.isnan, found.values()))


class CountsWords(nn.Module):
    """Predicts the number of a row's words: as a class where there are labels, else as a number."""

    def __init__(self, labels):
        super().__init__()
        self.labels = labels

    def forward(self, input_ids, attention_mask):
        assert not self.training
        count = attention_mask.sum(1) - 2
        logits = nn.functional.one_hot(count, self.labels).float() if self.labels else count[:, None].float()
        return SimpleNamespace(logits=logits)


def test_evaluate_scores_every_example_whatever_the_batches(make_tokenizer):
    texts = ["w1 " * count for count in (3, 0, 2, 1, 3, 2, 1)]
    classes = [Example(text, None, label) for text, label in zip(texts, (3, 0, 2, 1, 3, 0, 0), strict=True)]
    for batch_size in (1, 3, 100):
        found = evaluate(CountsWords(4), make_tokenizer(), task("accuracy", tuple("abcd"), dev=classes), "dev", batch_size, torch.device("cpu"))
        assert found == {"accuracy": pytest.approx(5 / 7)}
    numbers = [Example(text, None, float(label)) for text, label in zip(texts, (3, 0, 2, 1, 3, 2, 1), strict=True)]
    assert evaluate(CountsWords(0), make_tokenizer(), task("pearson", (), dev=numbers), "dev", 3)["pearson"] == pytest.approx(1)
