from __future__ import annotations

import numpy as np
import pytest

from pipeline.artifacts import Artifact
from pipeline.corpus.store import Store, Writer
from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.packing.loader import Loader
from pipeline.packing.plan import Plan
from pipeline.recipe import Recipe
from pipeline.stages import pack
from pipeline.workflow import Work

LENGTHS = {"train": [40, 12, 3, 29], "valid": [25]}


@pytest.fixture
def make_work(tmp_path, finetuned):
    def make(lengths=LENGTHS, **settings):
        for split, counts in lengths.items():
            (tmp_path / "tokenize" / split).mkdir(parents=True)
            with Writer(tmp_path / "tokenize" / split / "00000", np.uint16) as writer:
                for length in counts:
                    writer.add(5 + np.arange(length) % 10)
        finetuned.tokenizer.save_pretrained(tmp_path / "tokenize" / "tokenizer")
        (tmp_path / "work").mkdir()
        recipe = Recipe.model_validate({"name": "toy", "tokenize": {}, "pack": {"length": 12, **settings}})
        inputs = {"tokenize": Artifact(tmp_path / "tokenize", {})}
        return Work("pack", recipe, inputs, tmp_path / "work", tmp_path / "logs", Ranks())

    return make


def test_both_splits_get_a_plan_that_the_loader_reads(make_work, finetuned):
    work = make_work(segments="within", groups="consecutive", group_size=2)
    metrics = pack.run(work)
    # rows of 10 tokens: 40 = 4 rows; 12 = 1 row and 2 tokens dropped; 3 dropped; 29 = 2 rows and one of 9
    assert metrics == {"segments": 8, "groups": 5, "tokens": 79, "dropped_tokens": 5, "fill_rate": 0.79, "valid_segments": 2}
    for split, rows in (("train", 10), ("valid", 2)):
        plan = Plan.open(work.directory / split)
        batch = Loader(plan, Store.open(work.input("tokenize") / split), finetuned.tokenizer, rows, seed=1).batch(0)
        assert batch["input_ids"].shape == (rows, 12)
        assert sorted(batch["segment"][batch["segment"] >= 0]) == list(range(len(plan.segments) - 1))


def test_nothing_held_out_makes_an_empty_plan(make_work):
    work = make_work({"train": [40]})
    assert pack.run(work)["valid_segments"] == 0
    assert Plan.open(work.directory / "valid").groups.shape == (0, 1)


def test_groups_by_retrieval_say_how_many_near_duplicates_there_were(make_work):
    work = make_work({"train": [40, 40, 31, 29], "valid": [25]}, segments="within", groups="bm25", group_size=2)
    metrics = pack.run(work)
    assert metrics["duplicates"] > 0  # the documents repeat ten words
    assert metrics["dropped_tokens"] > 0
    assert (work.scratch / "train").is_dir()  # removed by the workflow, once it is published


def test_text_too_short_for_a_segment_is_refused(make_work):
    with pytest.raises(UserError, match=r"train: no document gives a segment; lower pack\.min_tokens"):
        pack.run(make_work({"train": [3, 4], "valid": [5]}, segments="within"))
