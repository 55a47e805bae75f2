"""An artifact is complete or absent, and knows what it was made of."""

import errno
import json
import multiprocessing
import os
import time

import pytest

from pipeline import artifacts
from pipeline.artifacts import Artifact, PlaceError
from pipeline.errors import UserError
from pipeline.settings import Settings, setting

DIGEST = artifacts.fingerprint({"a": 1}, {})


def make(directory, content=b"tokens", digest=DIGEST):
    with artifacts.working(directory, "tokenize", digest) as partial:
        (partial / "sub").mkdir(exist_ok=True)
        (partial / "sub" / "data.bin").write_bytes(content)
        return artifacts.publish(partial, stage="tokenize", digest=digest, settings={"a": 1}, inputs={}, metrics={"n": 3}, started=time.time())


def test_a_published_artifact_is_found_by_its_fingerprint_with_settings_files_and_metrics(tmp_path):
    made = make(tmp_path)
    found = artifacts.find(tmp_path, "tokenize", DIGEST)
    assert found == made
    assert found.metrics == {"n": 3}
    assert found.manifest["files"]["sub/data.bin"]["bytes"] == 6
    assert found.manifest["versions"]["trimline"]
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_found_while_the_work_is_unfinished(tmp_path):
    with pytest.raises(RuntimeError), artifacts.working(tmp_path, "tokenize", DIGEST) as partial:
        (partial / "half").write_text("half")
        raise RuntimeError("killed")
    assert artifacts.find(tmp_path, "tokenize", DIGEST) is None
    with artifacts.working(tmp_path, "tokenize", DIGEST) as partial:
        assert (partial / "half").read_text() == "half"


def test_an_attempt_that_ends_in_a_users_mistake_leaves_nothing(tmp_path):
    with pytest.raises(UserError), artifacts.working(tmp_path, "tokenize", DIGEST) as partial:
        (partial / "half").write_text("half")
        raise UserError("bad corpus")
    assert not list(tmp_path.glob("tokenize*"))


def test_a_full_disk_is_told_and_keeps_what_resumes(tmp_path):
    with pytest.raises(PlaceError, match="disk is full"), artifacts.working(tmp_path, "tokenize", DIGEST) as partial:
        (partial / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(partial / "more"))
    assert (tmp_path / f"tokenize-{DIGEST[:8]}.partial" / "half").exists()


def test_a_run_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PlaceError, match="set runs_dir"), artifacts.working(tmp_path / "file" / "run", "tokenize", DIGEST):
        pass


def test_two_processes_cannot_make_the_same_artifact(tmp_path):
    with artifacts.working(tmp_path, "tokenize", DIGEST):
        pool = multiprocessing.get_context("spawn").Pool(1)
        with pool:
            assert "another process" in pool.apply(_try_to_work, (tmp_path,))


def _try_to_work(directory):
    try:
        with artifacts.working(directory, "tokenize", DIGEST):
            return "worked"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: (path / "manifest.json").write_text("{"), "not a readable manifest"),
        (lambda path: (path / "manifest.json").unlink(), "not a readable manifest"),
        (lambda path: (path / "manifest.json").write_text("[]"), "not a readable manifest"),
        (lambda path: (path / "sub" / "data.bin").write_bytes(b"tok"), "has 3 bytes, the manifest says 6"),
        (lambda path: (path / "sub" / "data.bin").unlink(), "is missing"),
    ],
)
def test_a_damaged_artifact_is_told_and_never_used(tmp_path, damage, expected):
    damage(make(tmp_path).path)
    with pytest.raises(UserError, match=expected):
        artifacts.find(tmp_path, "tokenize", DIGEST)


def test_altered_contents_of_the_same_size_are_found_when_asked(tmp_path):
    path = make(tmp_path).path
    (path / "sub" / "data.bin").write_bytes(b"tokenz")
    Artifact.open(path)
    with pytest.raises(UserError, match="was altered"):
        Artifact.open(path, check_contents=True)


def test_a_manifest_of_another_fingerprint_is_refused(tmp_path):
    path = make(tmp_path).path
    manifest = json.loads((path / "manifest.json").read_text())
    artifacts.write_json(path / "manifest.json", manifest | {"fingerprint": DIGEST[:8] + "0" * 56})
    with pytest.raises(UserError, match="expected"):
        artifacts.find(tmp_path, "tokenize", DIGEST)


def test_fields_that_cannot_change_the_result_are_left_out_of_the_fingerprint():
    class Inner(Settings):
        lr: float = setting(0.1, "")
        ranks: int = setting(1, "", result=False)

    class Outer(Settings):
        inner: Inner = setting(Inner(), "")
        log_every: int = setting(1, "", result=False)

    assert artifacts.results_only(Outer()) == {"inner": {"lr": 0.1}}


def test_the_fingerprint_depends_on_settings_and_inputs_and_not_on_their_order():
    assert artifacts.fingerprint({"a": 1, "b": 2}, {}) == artifacts.fingerprint({"b": 2, "a": 1}, {})
    assert len({artifacts.fingerprint({"a": 1}, {}), artifacts.fingerprint({"a": 2}, {}), artifacts.fingerprint({"a": 1}, {"x": "y"})}) == 3


def test_a_file_is_identified_by_its_contents_not_its_place_or_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("same")
    os.utime(tmp_path / "b", (1, 1))
    assert artifacts.file_identity(tmp_path / "a") == artifacts.file_identity(tmp_path / "b")
    (tmp_path / "b").write_text("else")
    assert artifacts.file_identity(tmp_path / "a") != artifacts.file_identity(tmp_path / "b")
