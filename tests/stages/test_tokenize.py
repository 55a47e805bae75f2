from __future__ import annotations

import json
import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.corpus import spool, tokenizer
from pipeline.corpus.settings import TokenizeSettings
from pipeline.corpus.store import Store
from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.stages import tokenize
from pipeline.workflow import Work


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """3 MB in two files, so that there are several shards of 1 MB; 50 documents come twice."""
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randrange(2, 9))) for _ in range(3000)]
    documents = [" ".join(draw.choices(words, k=80)) + "\n" + " ".join(draw.choices(words, k=20)) for _ in range(4500)]
    directory = tmp_path_factory.mktemp("corpus")
    for number, part in enumerate((documents[:2000], documents[2000:] + documents[:50])):
        (directory / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return directory


def work(directory, corpus, ranks=None, **options):
    settings = {"sources": [str(corpus / "*.jsonl")], "tokenizer": "bpe", "vocab_size": 600, "shard_megabytes": 1, "validation": 0.05, **options}
    recipe = Recipe.model_validate({"name": "test", "tokenize": settings})
    directory.mkdir(exist_ok=True)
    return Work("tokenize", recipe, {}, directory, directory, ranks or Ranks())


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The artifact of one rank, and its metrics."""
    directory = tmp_path_factory.mktemp("alone")
    return directory, tokenize.run(work(directory, corpus))


def content(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_the_artifact_holds_what_the_metrics_say(alone):
    directory, metrics = alone
    assert sorted(path.name for path in directory.iterdir()) == ["corpus.json", "tokenizer", "train", "valid"]
    assert json.loads((directory / "corpus.json").read_text()) == metrics
    assert metrics["documents"] == 4500
    assert metrics["duplicates"] == 50
    assert metrics["vocab_size"] == 600
    assert 100 < metrics["valid_documents"] < 350
    assert len(list((directory / "train").glob("*.idx"))) >= 3
    for split in ("train", "valid"):
        store = Store.open(directory / split)
        assert store.dtype == np.uint16
        assert len(store) == metrics[f"{split}_documents"]
        assert store.lengths.sum() == metrics[f"{split}_tokens"]
    assert metrics["bytes_per_token"] == pytest.approx(metrics["train_bytes"] / metrics["train_tokens"], abs=1e-3)


def test_the_stored_tokens_decode_to_the_documents_each_ended_once(alone, corpus):
    directory, metrics = alone
    written = {json.loads(line)["text"] for path in corpus.glob("*.jsonl") for line in path.read_text().splitlines()}
    fast = tokenizer.load(directory / "tokenizer")
    read = set()
    size = 0
    for split in ("train", "valid"):
        store = Store.open(directory / split)
        for number in range(len(store)):
            *tokens, end = store.read(number).tolist()
            assert end == 3
            assert 3 not in tokens
            read.add(fast.decode(tokens))
            size += len(fast.decode(tokens).encode())
    assert read == written
    assert size == metrics["train_bytes"] + metrics["valid_bytes"]


@dataclass(frozen=True)
class Threads(Ranks):
    """Ranks that are threads of this process and meet at a barrier."""

    meet: threading.Barrier | None = None

    def barrier(self) -> None:
        self.meet.wait(timeout=60)


def test_the_artifact_does_not_depend_on_the_number_of_ranks(alone, corpus, tmp_path):
    size = 3
    meet = threading.Barrier(size)
    returned = {}

    def rank(number):
        returned[number] = tokenize.run(work(tmp_path / "run", corpus, Threads(number, size, "threads", meet)))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert returned[0] == alone[1]
    assert content(tmp_path / "run") == content(alone[0])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 2])
def test_killed_work_goes_on_without_redoing_finished_shards(alone, corpus, tmp_path, monkeypatch, after):
    encoded = []
    real = spool.texts

    def texts(path):
        if path.parent.parent.name == "text" and tokenizing:
            if len(encoded) == after and dying:
                raise Killed
            encoded.append(path)
        return real(path)

    monkeypatch.setattr(spool, "texts", texts)
    tokenizing = dying = True
    real_make = tokenize.make_tokenizer

    def make(*arguments):  # reading the sample is not encoding
        nonlocal tokenizing
        tokenizing = False
        real_make(*arguments)
        tokenizing = True

    monkeypatch.setattr(tokenize, "make_tokenizer", make)
    with pytest.raises(Killed):
        tokenize.run(work(tmp_path / "run", corpus))
    dying = False
    monkeypatch.setattr(spool.documents, "read", None)  # the corpus is not read a second time
    assert tokenize.run(work(tmp_path / "run", corpus)) == alone[1]
    assert len(encoded) == len(set(encoded))
    assert content(tmp_path / "run") == content(alone[0])


def test_a_finished_stage_that_was_killed_before_publishing_gives_its_metrics_again(alone, corpus, monkeypatch):
    monkeypatch.setattr(spool, "write", None)
    assert tokenize.run(work(alone[0], corpus)) == alone[1]


def test_validation_sources_are_the_held_out_documents_and_copies_of_them_leave_train(corpus, tmp_path):
    options = {"validation": 0, "validation_sources": [str(corpus / "0.jsonl")], "tokenizer": "bytes", "vocab_size": None}
    made = tokenize.run(work(tmp_path / "run", corpus, **options))
    assert made["valid_documents"] == 2000
    assert made["train_documents"] == 2500


def test_documents_of_held_out_modules_are_validation_and_no_others(tmp_path, monkeypatch):
    from pipeline.corpus import embedded

    entries = list(embedded.entries(["networkx"]))
    monkeypatch.setattr(embedded, "entries", lambda: iter(entries))
    spool.write(TokenizeSettings(deduplicate=None, min_characters=1, shard_megabytes=1), tmp_path / "text")
    for split, held_out in (("train", False), ("valid", True)):
        found = [text for path in spool.shards(tmp_path / "text", split) for text in spool.texts(path)]
        assert found == [entry.document.strip() for entry in entries if (embedded.split_of(entry.module) != "train") == held_out]


def test_everything_is_kept_without_deduplication(corpus, tmp_path):
    assert tokenize.run(work(tmp_path / "run", corpus, deduplicate=None, tokenizer="bytes", vocab_size=None))["documents"] == 4550


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_characters": 10_000}, r"no document to train on \(4550 shorter than min_characters 10000"),
        ({"validation": 1e-9}, r"validation 1e-09 holds out none of 4500 documents; set validation above 0\.000"),
        ({"vocab_size": 100_000}, "vocab_size 100000 is larger than the corpus allows: at most"),
        ({"validation": 0, "validation_sources": ["short.txt"]}, r"validation_sources \(short\.txt\): no document is left"),
    ],
)
def test_a_corpus_that_does_not_suffice_is_refused(corpus, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short\n")
    with pytest.raises(UserError, match=said):
        tokenize.run(work(tmp_path / "run", corpus, **options))
    assert not (tmp_path / "run" / "corpus.json").exists()
