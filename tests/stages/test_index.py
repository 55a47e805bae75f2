"""The index stage and the verbs that change what it made, and what becomes of the stages that read it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from pipeline import artifacts, cli, recipe, workflow
from pipeline.artifacts import Artifact
from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks
from pipeline.memory.datastore import Datastore
from pipeline.models import identity
from pipeline.packing.plan import tokenizer_identity
from tests.memory.stores import decoder, token_store, word_tokenizer

TOKENIZER = {"sources": ["corpus.txt"], "tokenizer": "bytes"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Loads a recipe that indexes a model somebody else made; its tokenize stage is done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("Some text.\n")
    tokenizer = word_tokenizer(tmp_path / "tokenizer")
    decoder(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def load(index: dict, **sections: object) -> recipe.Recipe:
        whole = {"name": "run", "tokenize": TOKENIZER, "model": {"from": "model", "kind": "decoder"}, "index": index, **sections}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
        loaded = recipe.load(tmp_path / "recipe.yaml")
        step = workflow.resolve(loaded)[0]
        if step.artifact is None:
            with artifacts.working(loaded.directory, "tokenize", step.fingerprint) as partial:
                shutil.copytree(tmp_path / "tokenizer", partial / "tokenizer")
                token_store(partial / "train", 30)
                artifacts.publish(
                    partial, stage="tokenize", digest=step.fingerprint, settings=step.settings, inputs={}, metrics={}, started=time.time()
                )
        return loaded

    return load


WINDOW = {"block": 8, "context": 4}


def made(loaded) -> Artifact:
    workflow.execute(loaded, "index", Ranks())
    artifact = workflow.resolve(loaded)[1].artifact
    assert artifact is not None
    return artifact


def trimline(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_training_documents_of_a_checkpoint_are_indexed(run, tmp_path):
    artifact = made(run({"window": WINDOW, "max_keys": 200}))
    opened = Datastore.open(artifact.path)
    assert artifact.metrics["entries"] == len(opened) <= 200
    assert artifact.metrics["kind"] == "flat"
    opened.check(identity.fingerprint(tmp_path / "model"), tokenizer_identity(word_tokenizer(tmp_path / "again")))
    assert opened.encoder is None
    assert opened.search(torch.randn(2, 16), 3)[1].min() >= 3
    assert not (artifact.path / "scratch").exists()


def test_other_documents_and_a_smaller_encoder(run, tmp_path):
    (tmp_path / "other.txt").write_text("w5 w6 w7\n\nw8 w9\n")
    decoder(tmp_path / "small", seed=4)
    loaded = run({"window": WINDOW, "sources": ["other.txt"], "encoder": "small"})
    opened = Datastore.open(made(loaded).path)
    assert len(opened) == 5
    assert opened.encoder == tmp_path / "small"
    opened.check(identity.fingerprint(tmp_path / "small"), opened.description["tokenizer"])
    assert set(opened.search(torch.zeros(1, 16), 5)[1][0].tolist()) == {3, 6, 7, 9}
    (tmp_path / "other.txt").write_text("w5 w6 w7 w8\n")
    assert workflow.resolve(loaded)[1].why.startswith("stale: sources")
    (tmp_path / "other.txt").unlink()
    with pytest.raises(UserError, match=r"other\.txt"):
        workflow.resolve(loaded)


def test_an_encoder_with_another_tokenizer_is_refused(run, tmp_path):
    decoder(tmp_path / "small", seed=4)
    word_tokenizer(tmp_path / "small", 50)
    with pytest.raises(UserError, match="another tokenizer"):
        made(run({"window": WINDOW, "encoder": "small"}))


def test_documents_are_added_found_and_withdrawn_on_the_command_line(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    artifact = made(run({"window": WINDOW}, evaluate={}, finetune={}))
    place, before = artifact.path, artifact.metrics["entries"]
    (tmp_path / "more.txt").write_text("w5 w6 w7 w8\n\nw9 w10 w11\n")
    assert "2 documents added" in trimline("datastore", "add", place, "more.txt")
    found = trimline("datastore", "info", place, "--find", "W9 w10")
    assert "1 document with 'W9 w10'" in found
    assert "more.txt, document 2" in found
    assert f"{before + 7:,}" in found
    (tmp_path / "one.txt").write_text("w5 w6 w7 w8")
    assert "2 documents withdrawn" in trimline("datastore", "remove", place, "31", "--text", "one.txt")
    assert "0 documents with 'w9 w10'" in trimline("datastore", "info", place, "--find", "w9 w10")
    assert len(Datastore.open(place)) == before
    Artifact.open(place, check_contents=True)
    refused = CliRunner().invoke(cli.app, ["datastore", "remove", str(place), "31"])
    assert refused.exit_code == 2
    assert CliRunner().invoke(cli.app, ["datastore", "remove", str(place)]).exit_code == 2


def test_what_reads_a_datastore_is_stale_once_its_documents_change(run, tmp_path):
    loaded = run({"window": WINDOW}, evaluate={}, finetune={})

    def fingerprint(reader: recipe.Recipe = loaded) -> str:
        return workflow.resolve(reader)[-1].fingerprint

    planned = fingerprint()
    artifact = made(loaded)
    assert fingerprint() == planned  # a job that was submitted before is known again
    other = loaded.model_copy(update={"index": None, "evaluate": loaded.evaluate.model_copy(update={"datastore": str(artifact.path)})})
    reads_other = fingerprint(other)
    trimline("datastore", "remove", artifact.path, "2")
    assert workflow.resolve(loaded)[1].artifact is not None
    assert fingerprint() != planned
    assert fingerprint(other) != reads_other


def test_a_change_that_was_cut_off_is_completed_before_the_artifact_is_looked_at(run, monkeypatch):
    from pipeline.memory import changes

    loaded = run({"window": WINDOW})
    artifact = made(loaded)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "revise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            changes.remove(artifact.path, [2])
    with pytest.raises(UserError, match="the manifest says"):
        Artifact.open(artifact.path)
    assert workflow.resolve(loaded)[1].artifact is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"kind": "decoder"}}, "index needs a model"),
        ({"pack": {}, "pretrain": {}, "model": {}}, "set it to decoder"),
        ({"tokenize": None}, "index needs tokenize"),
        (
            {"pack": {}, "pretrain": {"objective": {"name": "causal"}}, "model": {"kind": "decoder"}, "index": {"window": {"block": 900}}},
            "exceeds model.max_length",
        ),
    ],
)
def test_recipes_that_cannot_be_indexed(run, changes, message):
    with pytest.raises(UserError, match=message):
        run(**{"index": {"window": WINDOW}, **changes})


def test_two_mpi_ranks_make_what_one_makes(tmp_path):
    """The real launcher, from text to datastore."""
    draws = np.random.default_rng(0)
    (tmp_path / "corpus.txt").write_text("\n\n".join(" ".join(f"word{n}" for n in draws.integers(0, 40, size=20)) for _ in range(40)))
    corpus, found = str(tmp_path / "corpus.txt"), []
    for ranks in (1, 2):
        written = {
            "name": f"run{ranks}", "runs_dir": str(tmp_path / "runs"), "tokenize": {**TOKENIZER, "sources": [corpus], "validation": 0.2},
            "model": {"from": str(tmp_path / "model")}, "index": {"ranks": ranks, "shard_keys": 800, "kind": "ivfpq", "lists": 16, "window": WINDOW},
        }  # fmt: skip
        decoder(tmp_path / "model", words=261)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written))
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "run", str(tmp_path / "recipe.yaml")], capture_output=True, text=True, check=False,
            cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (place,) = (tmp_path / "runs" / f"run{ranks}").glob("index-????????")
        found.append({str(path.relative_to(place)): path.read_bytes() for path in place.glob("datastore/**/*") if path.is_file()})
    assert len(found[0]) > 10
    assert found[0] == found[1]
