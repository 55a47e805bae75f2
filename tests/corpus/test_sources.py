from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from pipeline.corpus import documents, sources
from pipeline.corpus.settings import Source, TokenizeSettings
from pipeline.errors import UserError
from pipeline.shipped import shipped


def texts_of(path, **options):
    return [document.text for document in documents.read(Source(path=str(path), **options))]


WIKITEXT = """ \n = First = \n \n Text , with = signs = \n \n = = A section = = \n
 = not a title =
 more text .
 = neither =\n \n = M = 2 = \n \n = = = Deep = = = \n \n End .\n"""


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


# -- what a recipe depends on -----------------------------------------------------------------------------------------


def test_identity_is_plain_json_and_follows_content_not_time(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(lines({"text": "one"}))
    settings = TokenizeSettings(sources=(str(file), "embedded"), validation=0, validation_sources=({"hub": "wikitext", "split": "test"},))
    first = sources.identity(settings)
    assert json.loads(json.dumps(first)) == first
    file.write_text(lines({"text": "one"}))
    assert sources.identity(settings) == first
    file.write_text(lines({"text": "two"}))
    assert sources.identity(settings) != first


def test_identity_follows_the_tokenizers_content(tmp_path):
    specification = tmp_path / "mine.yaml"
    specification.write_text("kind: bpe\n")
    settings = TokenizeSettings(tokenizer=str(specification))
    first = sources.identity(settings)
    specification.write_text("# a remark changes nothing\nkind: bpe\n")
    assert sources.identity(settings) == first
    specification.write_text("kind: unigram\n")
    assert sources.identity(settings) != first
    assert sources.identity(settings.model_copy(update={"vocab_size": 500})) != sources.identity(settings)


def test_identity_imports_nothing_heavy():
    code = (
        "import sys; from pipeline.corpus import sources; from pipeline.corpus.settings import TokenizeSettings;"
        "sources.identity(TokenizeSettings());"
        "print(sorted({'torch', 'numpy', 'datasets', 'transformers', 'sentencepiece'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_shipped_specification_is_valid():
    shipped_ones = sorted(shipped("tokenizers").glob("*.yaml"))
    assert [sources.specification(path).kind for path in shipped_ones] == ["bpe", "bpe", "bytes", "unigram", "words"]


def test_globs_are_expanded_in_sorted_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.csv"):
        (tmp_path / name).write_text("text\nx")
    assert [path.name for path in sources.files(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sources": ("none.jsonl",)}, r"none\.jsonl: no such file"),
        ({"sources": ("none*.jsonl",)}, r"none\*\.jsonl: no file matches"),
        ({"sources": ("empty.txt",)}, r"empty\.txt: the file is empty"),
        ({"sources": (".",)}, "is a directory"),
        ({"sources": ("a.docx",)}, r"a\.docx: unknown kind of file '\.docx'; known are \.jsonl, \.txt, \.tokens, \.csv, \.parquet"),
        ({"sources": ("a.parquet.gz",)}, r"unknown kind of file '\.parquet\.gz'"),
        ({"tokenizer": "unigran"}, "tokenize.tokenizer 'unigran': no such tokenizer; give one of bpe, bpe-32k, bytes, unigram, words"),
        ({"tokenizer": "a.docx"}, r"a\.docx: expected a \.yaml specification"),
        ({"tokenizer": "bad.yaml"}, r"bad\.yaml: vocabsize: .* known keys are kind, vocab_size"),
        ({"tokenizer": "list.yaml"}, r"list\.yaml: expected keys of a tokenizer specification"),
        ({"tokenizer": "a.model", "vocab_size": 500}, "vocab_size is for tokenizers that are trained"),
        ({"vocab_size": 100}, "tokenize.vocab_size: .* found 100"),
    ],
)
def test_what_is_missing_empty_or_unknown_is_refused_before_anything_runs(tmp_path, monkeypatch, settings, said):
    monkeypatch.chdir(tmp_path)
    for name in ("a.docx", "a.parquet.gz", "a.model"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.yaml").write_text("kind: bpe\nvocabsize: 3\n")
    (tmp_path / "list.yaml").write_text("- kind\n")
    with pytest.raises(UserError, match=said):
        sources.identity(TokenizeSettings(**settings))


# -- reading ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_is_read_plain_and_compressed(tmp_path):
    import pandas

    expected = ["one\ntwo", 'naïve "quoted", 3', "NA"]
    written = {
        "a.jsonl": lines(*({"id": number, "text": text} for number, text in enumerate(expected))),
        "a.txt": "\n\n".join(expected),
        "a.csv": pandas.DataFrame({"id": range(3), "text": expected}).to_csv(index=False),
    }
    for name, content in written.items():
        (tmp_path / name).write_text(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        assert texts_of(tmp_path / name) == texts_of(tmp_path / f"{name}.gz") == expected
    pandas.DataFrame({"id": range(3), "text": expected}).to_parquet(tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == expected


def test_another_text_column_can_be_named_and_rows_without_text_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"body": "one"}, {"body": None}, {"body": "two"}))
    assert texts_of(tmp_path / "a.jsonl", text="body") == ["one", "two"]


def test_files_of_a_glob_are_read_in_sorted_order(tmp_path):
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text(lines({"text": name}))
    assert texts_of(tmp_path / "*.jsonl") == ["a", "b"]


def test_cleaning_unifies_newlines_and_removes_control_characters():
    assert documents.clean("\ufeff a\r\n\tb\rc\x00\ud800\n\n  d ") == "a\n\tb\nc\n\n  d"


GOOD = lines({"text": "a good line"}).encode() * 60_000  # 1.4 MB: more than a block of the search for the place


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", lines({"body": "x", "title": "y"}).encode(), r"a\.jsonl: no column 'text'; it has 'body', 'title'"),
        ("a.csv", b"body,title\nx,y\n", r"a\.csv: no column 'text'; it has 'body', 'title'"),
        ("a.jsonl", lines({"text": 3}).encode(), r"a\.jsonl: column 'text' holds int64, expected text"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n' + GOOD, rf"a\.jsonl: not UTF-8 text: byte 0xff at offset {len(GOOD) + 10}"),
        ("a.txt", GOOD + b"\xe4\n", rf"a\.txt: not UTF-8 text: byte 0xe4 at offset {len(GOOD)}"),
        ("a.txt", GOOD + b"\xe4", rf"a\.txt: not UTF-8 text: it ends inside a character at offset {len(GOOD)}"),
        ("a.csv", b"text\n" + GOOD + b"\xff\n", rf"a\.csv: not UTF-8 text: byte 0xff at offset {len(GOOD) + 5}"),
        ("a.txt.gz", gzip.compress(b"caf\xe9\n"), r"a\.txt\.gz: not UTF-8 text: byte 0xe9 at offset 3"),
        ("a.jsonl", GOOD + b'{"text": "x"\n' + GOOD, r"a\.jsonl: line 60001, column \d+: not JSON"),
        ("a.jsonl", b'"one"\n"two"\n', r"a\.jsonl: line 1: str .* expected one JSON object a line"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-100], r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: .*gzip"),
        ("a.parquet", b"not parquet", r"a\.parquet: not a readable Parquet file"),
    ],
)
def test_unreadable_text_is_refused_naming_file_and_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        texts_of(tmp_path / name)


def test_a_hub_dataset_that_cannot_be_reached_is_refused_naming_it(monkeypatch):
    import datasets

    def absent(name, *_, **options):
        assert "trust_remote_code" not in options
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(UserError, match="hub dataset some/where, subset x, split train: cannot be read: no route"):
        list(documents.read(Source(hub="some/where", subset="x")))


@pytest.mark.parametrize("name", ["wiki.train.tokens", "wiki.train.tokens.gz"])
def test_a_document_of_wikitext_is_an_article(tmp_path, name):
    content = WIKITEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = texts_of(tmp_path / name)
    assert [documents.clean(text).split("\n")[0] for text in found] == ["= First = ", "= M = 2 = "]
    assert "".join(found) == WIKITEXT
    (tmp_path / name).write_bytes(b" = A = \n\xff")
    with pytest.raises(UserError, match=r"not (UTF-8 text|a whole gzip file)"):
        texts_of(tmp_path / name)
