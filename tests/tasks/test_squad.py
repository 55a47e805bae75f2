from __future__ import annotations

import gzip
import json

import pytest

from pipeline.errors import UserError
from pipeline.tasks import squad
from pipeline.tasks.squad import Question, normal, score, word_f1

CONTEXT = "Following a referendum in 1997, the current Parliament was convened by the Scotland Act 1998."


def entry(*answers, id="q1", **more):
    return {"id": id, "question": " When was it convened? ", "answers": [{"text": text, "answer_start": start} for text, start in answers], **more}


@pytest.fixture
def write(tmp_path):
    def file(content, name="train.json"):
        if isinstance(content, list):
            content = json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": content}]}]})
        data = content.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return tmp_path / name

    return file


@pytest.mark.parametrize("name", ["train.json", "train.json.gz"])
def test_the_official_layout_is_read_compressed_or_not(write, name):
    questions = squad.read(write([entry(("1998", 88), ("Scotland Act 1998", 75))], name))
    assert questions == [Question("q1", "When was it convened?", CONTEXT, ("1998", "Scotland Act 1998"), (88, 75))]


def test_an_answer_said_to_be_a_character_off_is_found_where_it_is(write):
    assert squad.read(write([entry(("1998", 87), ("the", 70))]))[0].answer_starts == (88, 71)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([entry(), entry(("1998", 88), id="q2")], r"question q1 has no answer, as questions of SQuAD 2\.0 may; give files of SQuAD 1\.1"),
        ([entry(("1998", 88), is_impossible=True)], r"question q1 has no answer"),
        ([entry(("1999", 88))], r"question q1: its answer '1999' is not in the context"),
        ([entry((" ", 9))], r"question q1: its answer ' ' is not in the context"),
        ([], r"train\.json: no questions in it"),
        ("{", r"train\.json: not valid JSON"),
        ('{"data": [{"text": 1}]}', r"train\.json: not in SQuAD's layout \(KeyError\('paragraphs'\)\)"),
        ("[1]", r"train\.json: not in SQuAD's layout"),
    ],
)
def test_a_file_that_is_not_squad_is_refused(write, content, message):
    with pytest.raises(UserError, match=message):
        squad.read(write(content))


def test_answers_are_compared_as_the_official_script_does():
    assert normal("The  A-team's (an) 'Answer',\tpart 2.") == "ateams answer part 2"
    assert normal("theatre") == "theatre"
    assert normal("a an the.") == ""
    assert normal("Zürich\N{EN DASH}Bern") == "zürich\N{EN DASH}bern"  # ASCII punctuation alone


@pytest.mark.parametrize(
    ("predicted", "answer", "f1"),
    [
        ("the Scotland Act 1998", "Scotland Act", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("1998 1998", "1998", 2 * 0.5 * 1 / 1.5),  # a bag: the word counts once
        ("1997", "1998", 0.0),
        ("the", "the", 0.0),  # nothing is left of either
    ],
)
def test_f1_is_of_the_words_of_an_answer(predicted, answer, f1):
    assert word_f1(predicted, answer) == pytest.approx(f1)


def test_scores_are_the_best_of_the_right_answers_and_means_over_questions():
    # the example of the documentation of Hugging Face's `squad` metric, and beside it a question half right
    right = Question("56e10a3be3433e1400422b22", "", "", ("1976",), (97,))
    half = Question("b", "", "", ("Scotland Act", "the Scotland Act 1998"), (0, 0))
    assert score(["1976"], [right]) == {"f1": 1.0, "exact_match": 1.0}
    found = score(["1976", "Act 1998!"], [right, half])
    assert found == {"f1": pytest.approx((1 + 2 * 1 * (2 / 3) / (5 / 3)) / 2), "exact_match": 0.5}
