from __future__ import annotations

import gzip
import json

import pytest

from pipeline.errors import UserError
from pipeline.tasks import tables
from pipeline.tasks.tables import Columns


def columns(**values):
    return Columns(**{"text": "text", "text_pair": None, "label": "label", **values})


def rows(path, **values):
    return [(record.text, record.text_pair, record.label) for record in tables.read(path, columns(**values))]


@pytest.fixture
def table(tmp_path):
    def write(name, content, encoding="utf-8"):
        path = tmp_path / name
        data = content if isinstance(content, bytes) else content.encode(encoding)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def test_columns_are_found_by_name(table):
    # the layout of SST-2, RTE and official STS-B
    path = table("train.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta b\tc\tyes\n1\td\te f\tno\n")
    assert rows(path, text="sentence1", text_pair="sentence2") == [("a b", "c", "yes"), ("d", "e f", "no")]
    assert rows(path, text="sentence2") == [("c", None, "yes"), ("e f", None, "no")]


def test_columns_are_found_by_number_where_there_is_no_header(table):
    # the layout of CoLA
    path = table("train.tsv", "gj04\t1\t\tOne two.\ngj04\t0\t*\tTwo one.\n")
    assert rows(path, text=3, label=1) == [("One two.", None, "1"), ("Two one.", None, "0")]


def test_quotes_are_literal_where_the_recipe_says_so_and_a_byte_order_mark_is_skipped(table):
    # the layout of MRPC
    path = table("msr_paraphrase_train.txt", 'Quality\t#1 String\t#2 String\r\n1\t"The witness" left\the said "no\r\n', "utf-8-sig")
    assert rows(path, text="#1 String", text_pair="#2 String", label="Quality", quoting=False) == [('"The witness" left', 'he said "no', "1")]


def test_quoted_fields_may_hold_commas_quotes_and_line_ends(table):
    # the layout of STS-B
    path = table("train.csv", 'a,"b, ""c""\nd",3.800\ne,f,0\n')
    assert rows(path, text=0, text_pair=1, label=2) == [("a", 'b, "c"\nd', "3.800"), ("e", "f", "0")]
    assert [record.where for record in tables.read(path, columns(text=0, label=2))] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.json", "train.json.gz"])
def test_json_lines_are_read_compressed_or_not(table, name):
    path = table(name, '{"text": "a\u2028b", "label": 1}\n\n{"text": "c", "label": "no"}\n')
    assert rows(path) == [("a\u2028b", None, "1"), ("c", None, "no")]


def test_a_json_array_of_objects_is_read(table):
    path = table("train.json", json.dumps([{"text": "a", "label": True}, {"text": "b", "label": 0.5}], indent=1))
    assert rows(path) == [("a", None, "True"), ("b", None, "0.5")]


def test_lines_of_another_number_of_columns_can_be_passed_over_and_are_noted(table):
    path = table("train.tsv", "id\ttext\tlabel\n0\ta\tx\n1\tb\n2\tc\td\ty\n3\te\tz\n")
    broken = []
    assert [record.text for record in tables.read(path, columns(), broken)] == ["a", "e"]
    assert broken == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "sentence\tlabel\nx\t1\n", r"a\.tsv:1: no column 'text'; found sentence, label: correct the task's text"),
        ("a.tsv", "text\tlabel\nx\t1\nx\ty\t1\n", r"a\.tsv:3: 3 columns, the first line has 2; if double quotes are literal"),
        ("a.tsv", 'text\tlabel\n"x" y\t1\n', r"a\.tsv:2: .*set task\.quoting: false"),
        ("a.tsv", 'text\tlabel\nx\t1\n"x\t1\nx\t1\n', r"a\.tsv:3: .*set task\.quoting: false"),
        ("a.tsv", b"text\tlabel\nx\t1\n\xe9\t1\n", r"a\.tsv:3: not UTF-8 text \(byte 0xe9\)"),
        ("a.tsv.gz", b"text\tlabel\n\xff\t1\n", r"a\.tsv\.gz:2: not UTF-8"),
        ("a.tsv", "", r"a\.tsv: no examples in it"),
        ("a.tsv", "text\tlabel\n", r"a\.tsv: no examples in it"),
        ("a.jsonl", "\n", r"a\.jsonl: no examples in it"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}\n', r"a\.jsonl:2: no key 'label'; found text:"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: expected an object with text, label, found list"),
        ("a.json", '[{"text": "x", "label": 1}, {"text": 2, "label": 1}]', r"a\.json: item 1: expected texts as strings"),
        ("a.jsonl", '{"text": "x", "label": null}\n', r"a\.jsonl:1: expected .* found \[\"x\", null\]"),
        ("a.parquet", "x", r"a\.parquet: a task's table is a \.tsv"),
    ],
)
def test_a_bad_table_is_refused_by_file_and_line(table, name, content, message):
    with pytest.raises(UserError, match=message):
        tables.read(table(name, content), columns())


def test_a_missing_column_number_is_refused(table):
    with pytest.raises(UserError, match=r"a\.csv:1: no column 2; found 0, 1 \(all columns are numbers, so the file has no header\)"):
        tables.read(table("a.csv", "x,1\n"), columns(text=0, label=2))


def test_a_column_number_in_json_is_refused(table):
    with pytest.raises(UserError, match=r"a\.jsonl: column 0 is a number, but JSON objects have names"):
        tables.read(table("a.jsonl", '{"text": "x", "label": 1}'), columns(text=0))


def test_files_that_are_missing_or_cut_off_are_refused(table, tmp_path):
    with pytest.raises(UserError, match=r"none\.tsv: no such file"):
        tables.read(tmp_path / "none.tsv", columns())
    whole = table("a.tsv.gz", "text\tlabel\nx\t1\n")
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.tsv\.gz: not a whole gzip file"):
        tables.read(whole, columns())
