from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.tasks.metrics import evaluate, score
from pipeline.tasks.questions import QuestionTask
from pipeline.tasks.squad import Question
from pipeline.tasks.task import Example, Task

PREDICTED, TRUE = np.array([1, 1, 0, 1, 0, 0]), np.array([1, 0, 0, 1, 1, 0])  # 2 true positives, 1 false, 1 missed, 2 true negatives


def task(*metrics, labels=("no", "yes"), **splits):
    return Task(splits, labels, metrics, 16)


def test_classification_scores_are_those_of_their_definitions():
    found = score(task("matthews", "accuracy", "f1"), PREDICTED, TRUE)
    assert found == pytest.approx({"matthews": (2 * 2 - 1 * 1) / 9, "accuracy": 4 / 6, "f1": 4 / 6})
    assert list(found) == ["matthews", "accuracy", "f1"]


def test_scores_are_those_of_published_examples():
    # scikit-learn's user guide, Matthews correlation coefficient: y_true = [+1, +1, +1, -1], y_pred = [+1, -1, +1, +1] -> -0.33
    assert score(task("matthews"), np.array([1, 0, 1, 1]), np.array([1, 1, 1, 0]))["matthews"] == pytest.approx(-1 / 3)
    # the 68.4 and 81.2 of a constant answer on MRPC's development split, where 279 of 408 pairs are paraphrases
    majority = score(task("accuracy", "f1"), np.ones(408, dtype=int), np.repeat([1, 0], [279, 129]))
    assert majority == {"accuracy": pytest.approx(0.684, abs=5e-4), "f1": pytest.approx(0.812, abs=5e-4)}
    # SciPy's pages of pearsonr and spearmanr, their first examples
    found = score(task("pearson", labels=()), np.array([1, 2, 3, 4, 5, 6, 7]), np.array([10, 9, 2.5, 6, 4, 3, 2]))
    assert found["pearson"] == pytest.approx(-0.828503883588428)
    found = score(task("spearman", labels=()), np.array([1, 2, 3, 4, 5]), np.array([5, 6, 7, 8, 7]))
    assert found["spearman"] == pytest.approx(0.8207826816681233)


def test_f1_is_the_mean_over_labels_where_there_are_more_than_two():
    found = score(task("f1", labels=("a", "b", "c")), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))
    assert found["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_correlations_are_linear_and_by_rank():
    labels = np.array([0.0, 1.0, 2.0, 3.0])
    found = score(task("spearman", "pearson", labels=()), np.exp(labels), labels)
    assert found == pytest.approx({"spearman": 1.0, "pearson": np.corrcoef(np.exp(labels), labels)[0, 1]})


def test_a_correlation_with_a_constant_is_0_not_nan():
    assert score(task("pearson", "spearman", labels=()), np.zeros(3), np.array([1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


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


COUNTS = (3, 0, 2, 1, 3, 2, 1)


def examples(labels):
    return [Example("w1 " * count, None, label) for count, label in zip(COUNTS, labels, strict=True)]


def test_evaluate_scores_every_example_whatever_the_batches(make_tokenizer):
    classes = examples((3, 0, 2, 1, 3, 0, 0))
    for batch_size in (1, 3, 100):
        found = evaluate(
            CountsWords(4), make_tokenizer(), task("accuracy", labels=tuple("abcd"), dev=classes), "dev", batch_size, torch.device("cpu")
        )
        assert found == {"accuracy": pytest.approx(5 / 7)}
    numbers = examples([float(count) for count in COUNTS])
    assert evaluate(CountsWords(0), make_tokenizer(), task("pearson", labels=(), dev=numbers), "dev", 3)["pearson"] == pytest.approx(1)


def test_a_mismatched_split_is_scored_beside_development_and_test(make_tokenizer):
    matched = examples(COUNTS)
    splits = {"train": matched, "dev": matched, "test": matched, "mismatched": examples((0, *COUNTS[1:]))}
    mnli = task("accuracy", labels=tuple("abcd"), **splits)
    for split in ("dev", "test"):
        found = evaluate(CountsWords(4), make_tokenizer(), mnli, split, 4)
        assert found == {"accuracy": 1.0, "accuracy_mismatched": pytest.approx(6 / 7)}
    assert evaluate(CountsWords(4), make_tokenizer(), mnli, "train", 4) == {"accuracy": 1.0}


class PointsAtWords(nn.Module):
    """Scores each token by `start` and `end`, a number a token id; [cls] and the question's tokens score highest of all."""

    def __init__(self, start, end):
        super().__init__()
        self.start, self.end = start, end

    def forward(self, input_ids, attention_mask, token_type_ids):
        scores = [torch.zeros(input_ids.shape) for _ in range(2)]
        for found, wanted in zip(scores, (self.start, self.end), strict=True):
            for token, value in wanted.items():
                found[input_ids == token] = value
            found[(token_type_ids == 0) | (attention_mask == 0)] = 99.0
        return SimpleNamespace(start_logits=scores[0], end_logits=scores[1])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_best_answer_of_all_windows_is_cut_from_the_context(make_tokenizer, batch_size):
    context = "  ".join(f"w{number}" for number in range(40))  # two spaces, which the tokens do not tell
    questions = [Question("a", "w90 w91", context, ("w20  w21",), (context.index("w20"),)), Question("b", "w92", "w1 w2", ("the w2!",), (0,))]
    asked = QuestionTask({"dev": questions}, max_length=16, doc_stride=4, max_answer=3)
    model = PointsAtWords(start={25: 5.0, 9: 4.0, 7: 1.0}, end={26: 5.0, 30: 8.0, 7: 2.0})  # ids are numbers of words and 5
    found = evaluate(model, make_tokenizer(second_type=1), asked, "dev", batch_size)
    # w25 would be the best end, but five tokens after the best start; of the second question only w2 scores
    assert found == {"f1": 1.0, "exact_match": 1.0}
