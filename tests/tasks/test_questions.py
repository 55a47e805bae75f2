from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.tasks import questions
from pipeline.tasks import task as tasks
from pipeline.tasks.questions import QuestionTask, best_spans
from pipeline.tasks.squad import Question
from pipeline.tasks.tables import text_of

CONTEXT = " ".join(f"w{number}" for number in range(30))


def question(answer, context=CONTEXT, text="w90 w91"):
    return Question("q", text, context, (answer,), (context.index(answer),))


def encode(tokenizer, *asked, max_length=16, doc_stride=4):
    return QuestionTask({"train": list(asked)}, max_length, doc_stride, 30).encode(asked, tokenizer)


def test_a_long_context_is_cut_into_windows_that_share_doc_stride_tokens(make_tokenizer):
    windows = encode(make_tokenizer(second_type=1), question("w12 w13"))
    # `<s> w90 w91 </s> context </s>`: 11 places of context in a row of 16, 7 of them new in each window
    assert [len(tokens) for tokens in windows.tokens] == [16, 16, 16, 14]
    contexts = [tokens[4:-1].tolist() for tokens in windows.tokens]
    assert contexts == [list(range(5 + first, 5 + min(first + 11, 30))) for first in (0, 7, 14, 21)]
    assert all(tokens[:4].tolist() == [2, 95, 96, 3] for tokens in windows.tokens)
    assert windows.types[0].tolist() == [0] * 4 + [1] * 12
    assert windows.question.tolist() == [0] * 4


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_the_answer_is_a_span_of_tokens_and_cls_where_a_window_has_not_all_of_it(make_tokenizer, monkeypatch, chunk):
    monkeypatch.setattr(questions, "CHUNK", chunk)
    windows = encode(make_tokenizer(), question("w12 w13"), question("w10 w11"), question("w0"))
    spans = list(zip(windows.targets["start_positions"].tolist(), windows.targets["end_positions"].tolist(), strict=True))
    assert spans[:4] == [(0, 0), (9, 10), (0, 0), (0, 0)]  # w12 is the sixth of the second window's context, w7 to w17
    assert spans[4:8] == [(0, 0), (7, 8), (0, 0), (0, 0)]  # the first window ends between w10 and w11
    assert spans[8:] == [(4, 4), (0, 0), (0, 0), (0, 0)]
    assert windows.question.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_offsets_are_characters_of_the_context_and_nothing_else_has_any(make_tokenizer):
    context = "w1   (w2),\nw3"
    windows = encode(make_tokenizer(), question("w2", context))
    cut = [context[first:last] for first, last in windows.offsets[0] if first >= 0]
    assert cut == ["w1", "(", "w2", "),", "w3"]
    assert (windows.offsets[0][:, 0] >= 0).tolist() == [False] * 4 + [True] * 5 + [False]
    assert windows.targets["start_positions"].tolist() == windows.targets["end_positions"].tolist() == [6]


def test_an_answer_that_is_a_part_of_a_token_or_has_spaces_around_it_is_the_tokens_that_hold_it(make_tokenizer):
    windows = encode(make_tokenizer(), question("2 w1", "w12 w13 w14"), question(" w13 ", "w12 w13 w14"))
    assert windows.targets["start_positions"].tolist() == [4, 5]
    assert windows.targets["end_positions"].tolist() == [5, 5]


def test_a_question_is_cut_at_64_tokens(make_tokenizer):
    windows = encode(make_tokenizer(), question("w0", text=" ".join(f"w{number}" for number in range(70))), max_length=100, doc_stride=8)
    assert windows.tokens[0][:66].tolist() == [2, *range(5, 69), 3]


@settings(deadline=None)
@given(
    arrays.arrays(np.float32, (2, 7), elements=st.floats(-9, 9, width=32)),
    arrays.arrays(np.float32, (2, 7), elements=st.floats(-9, 9, width=32)),
    st.lists(st.booleans(), min_size=7, max_size=7).filter(any),
    st.integers(1, 9),
)
def test_the_best_span_is_the_best_of_all_that_are_allowed(start, end, inside, longest):
    value, first, last = best_spans(start, end, np.array([inside, inside]), longest)
    for row in range(2):
        allowed = {
            (i, j): start[row, i] + end[row, j] for i in range(7) for j in range(i, min(7, i + longest)) if inside[i] and inside[j]
        }  # fmt: skip
        assert (first[row], last[row]) in allowed
        assert value[row] == allowed[first[row], last[row]] == max(allowed.values())


def test_a_task_of_questions_is_kept_as_it_was_used_with_each_context_once(tmp_path):
    asked = [question("w1"), question("w2"), question("w3", "w3 w4")]
    task = QuestionTask({"train": asked[:2], "dev": asked[2:], "test": asked[2:]}, 48, 4, 30)
    task.save(tmp_path / "task.json")
    assert tasks.open(tmp_path / "task.json") == task
    assert text_of(tmp_path / "task.json").count("w29") == 1


@pytest.mark.parametrize("kept", [1, 2])
def test_max_train_draws_questions_from_train_alone(tmp_path, monkeypatch, kept):
    asked = [question(f"w{number}") for number in range(4)]
    monkeypatch.setattr(questions.squad, "read", lambda path: asked)
    settings = tasks.TaskSettings(squad={"train": "a", "dev": "b"}, max_train=kept)
    task = tasks.load(settings, seed=1)
    assert (len(task.splits["train"]), task.splits["dev"], task.max_length) == (kept, asked, 384)
