"""What `trimline submit` asks of a real Slurm of two nodes, and what becomes of it there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STAND_IN = """\
#!{python}
# Stands in for the interpreter of a job: the real chain, with stages that only publish.
import os, pathlib, signal, sys, time
stage, recipe_file = sys.argv[3:5]
here = pathlib.Path({here!r})
if (here / "fail").exists() and (here / "fail").read_text() == stage:
    sys.exit(3)
if stage == "pretrain" and (here / "wait").exists() and "SLURM_RESTART_COUNT" not in os.environ:
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(85))
    (here / ("waiting-" + os.environ["RANK"])).touch()
    time.sleep(60)
from pipeline import recipe, workflow
from pipeline.launch.ranks import Ranks
import importlib, types
names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT SLURMD_NODENAME".split()
(here / f"{{stage}}-{{os.environ.get('SLURM_PROCID')}}.env").write_text(" ".join(os.environ.get(name, "-") for name in names))
(here / "order").open("a").write(stage + "\\n") if os.environ["SLURM_PROCID"] == "0" else None
sys.modules[f"pipeline.stages.{{stage}}"] = types.SimpleNamespace(run=lambda work: {{"segments": 100}})
workflow.execute(recipe.load(recipe_file), stage, Ranks(int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"]), "torch"))
"""

RECIPE = """\
name: tiny
runs_dir: {here}/runs
tokenize: {{sources: [{here}/text.txt]}}
pack: {{}}
pretrain: {{}}
evaluate: {{}}
slurm:
  setup: ["export TRIMLINE_PYTHON={here}/stand-in"]
  stages:
    pretrain: {{nodes: 2, time: "10:00", extra: [--comment=hello]}}
"""


@pytest.fixture
def run(cluster, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Submits the tiny recipe; gives the job of each stage that was submitted."""
    (tmp_path / "text.txt").write_text("some text\n\nsome more\n")
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(here=tmp_path))
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(STAND_IN.format(python=sys.executable, here=str(tmp_path)))
    stand_in.chmod(0o755)

    def submit(*overrides: str) -> dict[str, str]:
        printed = cluster.call(sys.executable, "-m", "pipeline", "submit", str(tmp_path / "tiny.yaml"), *overrides).stdout
        return {line.split()[0]: line.split()[2].rstrip(":") for line in printed.splitlines() if " job " in line and "already" not in line}

    return submit


def test_ranks_on_two_nodes_find_one_another(cluster, run, tmp_path) -> None:
    jobs = run()
    assert list(jobs) == ["tokenize", "pack", "pretrain", "evaluate"]
    assert cluster.ended(jobs["evaluate"]) == "COMPLETED", cluster.tell()
    rows = [(tmp_path / f"pretrain-{rank}.env").read_text().split() for rank in (0, 1)]
    assert [row[:4] for row in rows] == [["0", "0", "2", "n1"], ["1", "0", "2", "n1"]]
    assert rows[0][4] == rows[1][4]
    assert [row[5] for row in rows] == ["n1", "n2"]
    assert cluster.job(jobs["pretrain"])["JobName"] == "tiny.pretrain"
    assert cluster.job(jobs["pretrain"])["TimeLimit"] == "00:10:00"
    assert cluster.job(jobs["pretrain"])["Comment"] == "hello"


def test_a_failing_stage_cancels_what_follows(cluster, run, tmp_path) -> None:
    (tmp_path / "fail").write_text("pack")
    jobs = run()
    assert cluster.ended(jobs["evaluate"]) == "CANCELLED"
    assert [cluster.job(job)["JobState"] for job in jobs.values()] == ["COMPLETED", "FAILED", "CANCELLED", "CANCELLED"]
    assert cluster.job(jobs["pack"])["ExitCode"] == "3:0"


def test_resubmitting_does_only_what_is_missing(cluster, run, tmp_path) -> None:
    (tmp_path / "fail").write_text("pretrain")
    cluster.ended(run()["evaluate"])
    (tmp_path / "fail").unlink()
    again = run()
    assert list(again) == ["pretrain", "evaluate"]
    assert cluster.ended(again["evaluate"]) == "COMPLETED"
    assert (tmp_path / "order").read_text().split() == ["tokenize", "pack", "pretrain", "evaluate"]
    assert run() == {}


def test_a_chain_in_the_queue_is_not_submitted_twice(cluster, run, tmp_path) -> None:
    (tmp_path / "wait").touch()
    jobs = run()
    assert run() == {}
    kept = json.loads((tmp_path / "runs/tiny/slurm/jobs.json").read_text())
    assert [entry["job"] for entry in kept.values()] == list(jobs.values())
    cluster.call("scancel", *jobs.values())
    cluster.ended(jobs["pretrain"])


def test_a_job_that_is_warned_saves_requeues_and_goes_on(cluster, run, tmp_path) -> None:
    (tmp_path / "wait").touch()
    jobs = run()
    cluster.wait(lambda: all((tmp_path / f"waiting-{rank}").exists() for rank in (0, 1)), "both ranks", 30)
    cluster.call("scancel", "--signal=USR2", jobs["pretrain"])
    cluster.resume(jobs["pretrain"])
    assert cluster.ended(jobs["evaluate"]) == "COMPLETED"
    assert cluster.job(jobs["pretrain"])["Restarts"] == "1"
    log = next((tmp_path / "runs/tiny/logs/slurm").glob("pretrain-*.out")).read_text()
    assert "back in the queue" in log
