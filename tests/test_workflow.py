"""The graph: what is done, what is stale and why, what runs next."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import artifacts, recipe, workflow
from pipeline.errors import UserError
from pipeline.launch.ranks import Ranks

RECIPE = """\
name: small
runs_dir: {runs}
tokenize:
  sources: [{text}]
  tokenizer: bytes
pack:
  length: 64
pretrain:
  steps: 10
"""


@pytest.fixture
def path(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some text.\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(runs=tmp_path / "runs", text=text))
    return path


def publish(loaded, stages):
    for step in workflow.resolve(loaded):
        if step.stage in stages:
            with artifacts.working(loaded.directory, step.stage, step.fingerprint) as partial:
                (partial / "data").write_text(step.stage)
                artifacts.publish(
                    partial,
                    stage=step.stage,
                    digest=step.fingerprint,
                    settings=step.settings,
                    inputs=step.inputs,
                    metrics={},
                    started=time.time(),
                )


def states(loaded):
    return {step.stage: step.why for step in workflow.resolve(loaded)}


def test_what_was_made_is_up_to_date_and_the_rest_is_not_made_yet(path):
    loaded = recipe.load(path)
    publish(loaded, ["tokenize", "pack"])
    assert states(loaded) == {"tokenize": "up to date", "pack": "up to date", "pretrain": "not made yet"}


def test_a_changed_setting_reruns_only_what_depends_on_it_and_says_why(path):
    publish(recipe.load(path), ["tokenize", "pack", "pretrain"])
    assert states(recipe.load(path, ["pack.length=32"])) == {
        "tokenize": "up to date",
        "pack": "stale: pack.length 64 -> 32",
        "pretrain": "stale: made from another pack",
    }
    assert states(recipe.load(path, ["tokenize.min_characters=5"]))["tokenize"] == "stale: tokenize.min_characters 32 -> 5"


def test_where_and_how_visibly_a_stage_runs_changes_nothing(path):
    publish(recipe.load(path), ["tokenize", "pack", "pretrain"])
    changed = ["pretrain.ranks=2", "pretrain.log_every=1", "pretrain.micro_batch_size=4", "tokenize.ranks=2", "slurm.nodes=4"]
    assert set(states(recipe.load(path, changed)).values()) == {"up to date"}


def test_a_changed_corpus_file_makes_everything_stale(path, tmp_path):
    publish(recipe.load(path), ["tokenize", "pack"])
    (tmp_path / "text.txt").write_text("Other text.\n")
    found = states(recipe.load(path))
    assert found["tokenize"].startswith("stale: sources")
    assert found["pack"] == "stale: made from another tokenize"


def test_unfinished_work_is_said_to_resume(path):
    loaded = recipe.load(path)
    step = workflow.resolve(loaded)[0]
    (loaded.directory / f"{step.name}.partial").mkdir(parents=True)
    assert states(loaded)["tokenize"] == "unfinished: resumes"


def test_a_stage_whose_input_is_missing_is_refused(path):
    with pytest.raises(UserError, match="pack reads tokenize, not made yet"):
        workflow.execute(recipe.load(path), "pack", Ranks())


def test_a_missing_corpus_file_is_told_before_anything_is_written(path, tmp_path):
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match=r"text\.txt"):
        workflow.resolve(recipe.load(path))
    assert not (tmp_path / "runs").exists()


def test_a_recovery_that_the_ranks_of_prune_cannot_divide_is_refused_before_they_start():
    overrides = ["prune.ranks=2", "prune.recovery.batch_size=7"]
    loaded = recipe.load(Path(__file__).parents[1] / "recipes" / "demo.yaml", overrides)
    whole, recovery = workflow.trainings(loaded, "prune")
    assert workflow.division(loaded, "prune", whole, 2) == (16, 1)
    with pytest.raises(UserError, match="7"):
        workflow.division(loaded, "prune", recovery, 2)


@pytest.mark.parametrize("method", ["one-shot", "student"])
def test_without_masks_the_recovery_is_all_that_prune_trains(method):
    overrides = [f"prune.method={method}", "prune.sparsity={shape: {layers: 2, heads: 2, ffn: 64}, units: [attention, heads, neurons]}"]
    loaded = recipe.load(Path(__file__).parents[1] / "recipes" / "demo.yaml", overrides)
    assert workflow.trainings(loaded, "prune") == [loaded.prune.recovery]


def test_resolving_imports_neither_torch_nor_deepspeed_nor_transformers(path):
    script = (
        "import sys; from pipeline import recipe, workflow, terminal; r = recipe.load(sys.argv[1]); terminal.plan(r, workflow.resolve(r));"
        "heavy = {'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
