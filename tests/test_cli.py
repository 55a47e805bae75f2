"""The command: quick to answer, and one screen for every mistake: the place, the remedy, exit code 2, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHAIN = """\
name: small
runs_dir: {directory}/runs
tokenize:
  sources: [{directory}/corpus.txt]
  tokenizer: bytes
  deduplicate: null
  validation: 0.2
pack:
  length: 32
model: {{layers: 1, hidden: 32, heads: 2, ffn: 64, max_length: 32}}
pretrain:
  steps: 2
  batch_size: 4
"""


def trimline(*arguments, check=None, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "COLUMNS": "200", **environment},
        cwd=Path(__file__).parent.parent,
    )
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture
def path(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"Document {n} says that {n} times {n} is {n * n}." for n in range(60)))
    (tmp_path / "recipe.yaml").write_text(CHAIN.format(directory=tmp_path))
    return tmp_path / "recipe.yaml"


def mistake(path, *arguments, **environment):
    """The message of a command that must end in a user's mistake; nothing unfinished may be left."""
    done = trimline(*arguments, path, check=2, **environment)
    message = done.stderr.partition("trimline: ")[2]
    assert message, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(message.splitlines()) <= 24
    assert not list(path.parent.glob("runs/*/*.partial"))
    return message


def test_help_answers_at_once_and_imports_nothing_heavy():
    heavy = "{'torch', 'deepspeed', 'transformers', 'datasets', 'numpy', 'pydantic'} & set(sys.modules)"
    script = f"import sys\nfrom pipeline.cli import main\ntry: main()\nexcept SystemExit: print('heavy:', {heavy})"
    done = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert "heavy: set()" in done.stdout


def test_plan_says_what_would_run_and_the_derived_numbers_and_writes_nothing(path):
    done = trimline("plan", path, "pretrain.ranks=2", "pretrain.micro_batch_size=1", check=0)
    assert "not made yet" in done.stdout
    assert "4 rows = 2 ranks x 1 rows x 2 accumulated" in done.stdout
    assert not (path.parent / "runs").exists()


def test_a_rank_that_the_deepspeed_launcher_started_by_hand_takes_its_extra_option(path):
    assert "not made yet" in trimline("--local_rank=0", "plan", path, check=0, LOCAL_RANK="0").stdout


def test_a_misspelt_key(path):
    path.write_text(path.read_text().replace("length: 32\n", "lenght: 32\n", 1))
    assert mistake(path, "run").startswith(f"{path}:9: unknown key 'pack.lenght'; did you mean 'length'?")


def test_an_unknown_stage(path):
    done = trimline("bake", path, check=2)
    assert "No such command 'bake'" in done.stderr


def test_a_stage_the_recipe_does_not_have(path):
    assert "has no section 'prune'" in mistake(path, "prune")


def test_a_missing_corpus_file(path):
    (path.parent / "corpus.txt").unlink()
    assert str(path.parent / "corpus.txt") in mistake(path, "run")
    assert not (path.parent / "runs").exists()


def test_an_empty_corpus_file(path):
    (path.parent / "corpus.txt").write_text("")
    message = mistake(path, "run")
    assert "corpus.txt" in message
    assert "empty" in message


def test_a_corpus_file_that_is_not_utf8(path):
    (path.parent / "corpus.txt").write_bytes(
        b"A long enough first document of plain text, in a file.\n\n" * 50 + b"caf\xe9 is not UTF-8 here and now\n"
    )
    message = mistake(path, "tokenize")
    assert "corpus.txt" in message
    assert "UTF-8" in message


def test_a_vocabulary_larger_than_the_corpus_allows(path):
    path.write_text(path.read_text().replace("tokenizer: bytes", "tokenizer: unigram\n  vocab_size: 30000"))
    assert "vocab_size" in mistake(path, "tokenize")


def test_a_corrupt_store(path):
    trimline("tokenize", path, check=0)
    index = next(path.parent.glob("runs/small/tokenize-*/train/*.idx"))
    index.write_bytes(index.read_bytes()[:-3])
    message = mistake(path, "pack")
    assert str(index) in message
    assert "run the stage again" in message


def test_a_corrupt_manifest(path):
    trimline("tokenize", path, check=0)
    manifest = next(path.parent.glob("runs/small/tokenize-*/manifest.json"))
    manifest.write_text(manifest.read_text()[:100])
    assert f"{manifest}: not a readable manifest" in mistake(path, "pack")


def test_more_ranks_than_segments(path):
    path.write_text(path.read_text().replace("batch_size: 4", "batch_size: 64\n  ranks: 64"))
    (path.parent / "corpus.txt").write_text("One short document, no more than two rows of text.\n\nAnd one other to hold out, or not.")
    overrides = ["tokenize.validation=0"]
    trimline("tokenize", path, *overrides, check=0)
    trimline("pack", path, *overrides, check=0)
    done = trimline("pretrain", path, *overrides, check=2)
    assert "64 ranks share 3 segments" in done.stderr


def test_a_run_directory_that_cannot_be_written(path):
    (path.parent / "runs").write_text("a file in the way")
    assert "set runs_dir" in mistake(path, "run")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="a small disk to fill needs root and mount")
def test_a_full_disk(path):
    runs = path.parent / "runs"
    runs.mkdir()
    (path.parent / "corpus.txt").write_text("\n\n".join(f"Document {n} says that {n} times {n} is {n * n}." for n in range(20000)))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(runs)], check=False).returncode:
        pytest.skip("mount is not allowed here")
    try:
        done = trimline("tokenize", path, check=2)
        assert "the disk is full; free some space" in done.stderr
        assert not list(runs.glob("small/tokenize-????????"))
    finally:
        subprocess.run(["umount", str(runs)], check=True)


def test_a_plan_made_with_another_tokenizer(path):
    trimline("tokenize", path, check=0)
    trimline("pack", path, check=0)
    plan = next(path.parent.glob("runs/small/pack-*/train/plan.json"))
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"tokenizer": "0" * 64}))
    manifest_of = plan.parent.parent / "manifest.json"
    manifest = json.loads(manifest_of.read_text())
    manifest["files"]["train/plan.json"]["bytes"] = plan.stat().st_size
    manifest_of.write_text(json.dumps(manifest))
    done = trimline("pretrain", path, check=2)
    assert "the plan was made with tokenizer 00000000" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_done_is_not_done_again(path):
    trimline("tokenize", path, check=0)
    made = next(path.parent.glob("runs/small/tokenize-*")).stat().st_mtime_ns
    time.sleep(0.01)
    assert "up to date" in trimline("tokenize", path, check=0).stdout
    assert next(path.parent.glob("runs/small/tokenize-*")).stat().st_mtime_ns == made
