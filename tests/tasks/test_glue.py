from __future__ import annotations

import gzip

import pytest

from pipeline.errors import UserError
from pipeline.tasks import task as tasks
from pipeline.tasks.settings import TaskSettings

MNLI_TRAIN = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse sentence1 sentence2 label1"
MNLI_DEV = f"{MNLI_TRAIN} label2 label3 label4 label5"
STS = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
PAIRS = "index sentence1 sentence2 label"


def tabs(header):
    return header.replace(" ", "\t")


def mnli(label, dev=False):
    parses = ["( a )", "( b )", "(ROOT a)", "(ROOT b)"]
    return "\t".join(["0", "63735", "63735n", "slate", *parses, '"The new" rights', "Yes", *["x"] * (1 + 4 * dev), label])


def sts(sentence1, sentence2, score):
    return "\t".join(["0", "main-captions", "MSRvid", "2012test", "0001", "none", "none", sentence1, sentence2, score])


FILES = {
    "CoLA": {
        "train.tsv": ["gj04\t1\t\tOur friends won't buy this analysis.", 'gj04\t0\t*\t"They drank the pub.'],
        "dev.tsv": ["gj04\t1\t\tThe sailors rode."],
    },
    "SST-2": {"train.tsv": ["sentence\tlabel", "hide new secretions \t0", '"a joy \t1'], "dev.tsv": ["sentence\tlabel", "charming \t1"]},
    "MRPC": {
        "train.tsv": [f"\ufeff{MRPC}", '1\t702876\t702977\tHe called "the witness\t"Only the witness', "0\t2108705\t2108831\tYucaipa\tDominick's"],
        "dev.tsv": [f"\ufeff{MRPC}", "1\t1\t2\ta\tb"],
    },
    "STS-B": {
        "train.tsv": [tabs(STS), sts('"A plane', "An air plane", "5.000"), sts("a", "b", "0.800")],
        "dev.tsv": [tabs(STS), sts("a", "b", "4.750")],
    },
    "QQP": {
        "train.tsv": [
            tabs("id qid1 qid2 question1 question2 is_duplicate"),
            '133273\t213221\t213222\t"How is the life of a math student?\tWhich level?\t0',
            "402555\t536040\t536041\tHow do I control my emotions?",
            "360472\t364011\t490273\tWhat causes stool to be yellow?\tWhat causes it?\t1",
        ],
        "dev.tsv": [tabs("id qid1 qid2 question1 question2 is_duplicate"), "201359\t303345\t303346\tWhy?\tHow?\t0"],
    },
    "MNLI": {
        "train.tsv": [f"{tabs(MNLI_TRAIN)}\tgold_label", mnli("neutral"), mnli("entailment"), "cut off", mnli("contradiction")],
        "dev_matched.tsv": [f"{tabs(MNLI_DEV)}\tgold_label", mnli("contradiction", dev=True)],
        "dev_mismatched.tsv": [f"{tabs(MNLI_DEV)}\tgold_label", mnli("entailment", dev=True), mnli("neutral", dev=True)],
    },
    "QNLI": {
        "train.tsv": [tabs("index question sentence label"), '0\t"When did the war begin?\tUnlike the two.\tnot_entailment', "1\tq\ts\tentailment"],
        "dev.tsv": [tabs("index question sentence label"), "0\tq\ts\tentailment"],
    },
    "RTE": {
        "train.tsv": [tabs(PAIRS), "0\tNo Weapons.\tWeapons.\tnot_entailment", "1\ta\tb\tentailment"],
        "dev.tsv": [tabs(PAIRS), "0\ta\tb\tentailment"],
    },
    "WNLI": {
        "train.tsv": [tabs(PAIRS), "0\tI stuck a pin.\tThe carrot had a hole.\t1", "1\ta\tb\t0"],
        "dev.tsv": [tabs(PAIRS), "0\ta\tb\t0"],
    },
}
"""The layouts of GLUE's archive, a few lines each, with the quotes and the broken lines they have."""


@pytest.fixture
def load(tmp_path):
    def write_and_load(name, files, **values):
        for file, lines in files.items():
            content = "".join(f"{line}\n" for line in lines).encode()
            (tmp_path / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
        return tasks.load(TaskSettings(glue=name, directory=str(tmp_path), **values), seed=1)

    return write_and_load


@pytest.mark.parametrize(
    ("name", "labels", "metrics", "first", "label"),
    [
        ("CoLA", ("0", "1"), ("matthews", "accuracy"), ("Our friends won't buy this analysis.", None), 1),
        ("SST-2", ("0", "1"), ("accuracy",), ("hide new secretions ", None), 0),
        ("MRPC", ("0", "1"), ("accuracy", "f1"), ('He called "the witness', '"Only the witness'), 1),
        ("STS-B", (), ("pearson", "spearman"), ('"A plane', "An air plane"), 5.0),
        ("QQP", ("0", "1"), ("accuracy", "f1"), ('"How is the life of a math student?', "Which level?"), 0),
        ("MNLI", ("contradiction", "entailment", "neutral"), ("accuracy",), ('"The new" rights', "Yes"), 2),
        ("QNLI", ("entailment", "not_entailment"), ("accuracy",), ('"When did the war begin?', "Unlike the two."), 1),
        ("RTE", ("entailment", "not_entailment"), ("accuracy",), ("No Weapons.", "Weapons."), 1),
        ("WNLI", ("0", "1"), ("accuracy",), ("I stuck a pin.", "The carrot had a hole."), 1),
    ],
)
def test_each_task_is_read_in_its_official_layout(load, name, labels, metrics, first, label):
    task = load(name, FILES[name])
    assert (task.labels, task.metrics) == (labels, metrics)
    example = task.splits["train"][0]
    assert ((example.text, example.text_pair), example.label) == (first, label)
    assert {split: len(examples) for split, examples in task.splits.items() if split != "train"} == (
        {"dev": 1, "mismatched": 2, "test": 1} if name == "MNLI" else {"dev": 1, "test": 1}
    )


@pytest.mark.parametrize(("name", "line", "kept"), [("QQP", 3, 2), ("MNLI", 4, 3)])
def test_lines_that_the_archive_has_broken_are_passed_over_and_told(load, tmp_path, name, line, kept):
    task = load(name, FILES[name])
    assert len(task.splits["train"]) == kept
    assert task.remarks == (f"1 lines of another number of columns passed over, the first at {tmp_path}/train.tsv:{line}",)


def test_a_broken_line_of_another_task_is_an_error(load):
    with pytest.raises(UserError, match=r"train\.tsv:2: 3 columns, the first line has 4"):
        load("RTE", {"train.tsv": [tabs(PAIRS), "0\ta\tb", "1\ta\tb\tentailment"]})


def test_files_may_be_compressed_and_a_missing_dev_split_is_drawn_from_train(load):
    lines = [tabs(PAIRS), *(f"{number}\ta{number}\tb\tentailment" for number in range(20))]
    task = load("RTE", {"train.tsv.gz": lines})
    assert (len(task.splits["train"]), len(task.splits["dev"])) == (18, 2)
    assert task.remarks == ("no development split: 2 of 20 training examples are held out for it",)


def test_mrpc_is_read_as_microsoft_wrote_it_with_its_test_split(load):
    train = [f"\ufeff{MRPC}", *(f'{number % 2}\t1\t2\tsays "{number}\tb' for number in range(10))]
    task = load("MRPC", {"msr_paraphrase_train.txt": train, "msr_paraphrase_test.txt": [f"\ufeff{MRPC}", "0\t1\t2\tc\td"]})
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 9, "dev": 1, "test": 1}
    assert task.splits["test"][0].text == "c"
    assert all(example.text.startswith('says "') for example in task.splits["train"])


def test_stsb_is_read_as_a_csv_without_a_header(load):
    task = load("STS-B", {"train.csv": ['"A plane, ""fast"".",An air plane.,5.0', "a,b,3.8"], "dev.csv": ["a,b,0.25"]})
    assert [(example.text, example.label) for example in task.splits["train"]] == [('A plane, "fast".', 5.0), ("a", 3.8)]
    assert task.splits["dev"][0].label == 0.25


def test_mnli_without_development_splits_draws_one_and_with_half_of_them_is_refused(load, tmp_path):
    train = FILES["MNLI"]["train.tsv"]
    assert set(load("MNLI", {"train.tsv": train}).splits) == {"train", "dev", "test"}
    with pytest.raises(UserError, match=r"no dev_mismatched\.tsv \(nor dev_mismatched\.tsv\.gz\) beside the other development split of MNLI"):
        load("MNLI", {"dev_matched.tsv": FILES["MNLI"]["dev_matched.tsv"]})


def test_a_directory_without_the_files_is_refused_with_what_is_wanted_and_found(load, tmp_path):
    with pytest.raises(
        UserError, match=r"no train\.tsv \(\.gz\), nor msr_paraphrase_train\.txt \(\.gz\), the training split of GLUE's MRPC; found x\.tsv"
    ):
        load("MRPC", {"x.tsv": ["a"]})
    with pytest.raises(UserError, match=r"nowhere: no such directory; set task\.directory"):
        tasks.load(TaskSettings(glue="RTE", directory=str(tmp_path / "nowhere")), seed=1)


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "RTE",
            {"train.tsv": FILES["QNLI"]["train.tsv"]},
            r"train\.tsv:1: no column 'sentence1'; found index, question.*: GLUE's RTE has other columns",
        ),
        ("RTE", {"train.tsv": FILES["WNLI"]["train.tsv"]}, r"train\.tsv:2: label '1' is not among the task's \(entailment, not_entailment\)"),
        ("CoLA", {"train.tsv": ["source\tlabel\tmark\tsentence"]}, r"train\.tsv:1: label 'label' is not among the task's \(0, 1\)"),
        ("STS-B", {"train.csv": ["a,b,high"]}, r"train\.csv:1: label 'high' is not a number"),
        ("SST-2", {"train.tsv": FILES["SST-2"]["train.tsv"], "dev.tsv": ["sentence\tlabel"]}, r"dev\.tsv: no examples in it"),
    ],
)
def test_files_of_another_task_or_another_layout_are_refused_by_file_and_line(load, name, files, message):
    with pytest.raises(UserError, match=message):
        load(name, files)
