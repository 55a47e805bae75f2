"""The scripts that `trimline submit` makes, and what it does when the cluster does not play along."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from pipeline import artifacts, recipe, workflow
from pipeline.errors import UserError
from pipeline.launch import slurm
from pipeline.recipe import STAGES


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stand-ins for Slurm's commands on PATH: shell scripts, by name."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")

    def put(**scripts: str) -> None:
        for name, script in scripts.items():
            (place / name).write_text(f"#!/bin/bash\n{script}\n")
            (place / name).chmod(0o755)

    put(
        squeue="",
        scancel=f"echo $@ >> {tmp_path}/cancelled",
        sbatch=f"echo $2 >> {tmp_path}/submitted; echo $(( 100 + $(wc -l < {tmp_path}/submitted) ))",
    )
    return put


@pytest.mark.parametrize("stage", STAGES)
def test_every_script_is_bash_and_gives_all_its_options_before_its_first_command(chain, stage) -> None:
    text = slurm.render(chain(slurm={"partition": "gpu", "setup": ["module load cuda"]}), Path("recipe.yaml"), stage, "7")
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    lines = text.splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    assert lines[0] == "#!/bin/bash"
    assert {"--dependency=afterok:7", "--kill-on-invalid-dep=yes", "--partition=gpu"} <= set(options(text))
    assert lines.index("module load cuda") < next(n for n, line in enumerate(lines) if line.startswith("source "))


def test_the_first_stage_waits_for_nothing(chain) -> None:
    assert not [option for option in options(slurm.render(chain(), Path("recipe.yaml"), "tokenize")) if "dep" in option]


def test_settings_of_a_stage_replace_the_common_ones(chain) -> None:
    common = {"partition": "gpu", "nodes": 4, "gpus_per_node": 8, "time": "01:00:00", "extra": ["--exclusive"]}
    own = {"tokenize": {"partition": "cpu", "nodes": 1, "tasks_per_node": 16}, "pretrain": {"time": "2-00:00:00", "extra": ["--constraint=a100"]}}
    run = chain(slurm={**common, "stages": own})
    pretrain = options(slurm.render(run, Path("recipe.yaml"), "pretrain"))
    assert {"--partition=gpu", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=2-00:00:00", "--constraint=a100"} <= set(pretrain)
    assert "--exclusive" not in pretrain
    tokenize = options(slurm.render(run, Path("recipe.yaml"), "tokenize"))
    assert {"--partition=cpu", "--nodes=1", "--ntasks-per-node=16", "--time=01:00:00"} <= set(tokenize)
    assert not [option for option in tokenize if "gpus" in option]
    evaluate = options(slurm.render(run, Path("recipe.yaml"), "evaluate"))
    assert {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"} <= set(evaluate)


def test_ranks_are_warned_before_the_time_limit_where_they_can_go_on_later(chain) -> None:
    run = chain(slurm={"signal_seconds": 300})
    warned = {stage for stage in STAGES if "--signal=USR2@300" in options(slurm.render(run, Path("recipe.yaml"), stage))}
    assert warned == {"tokenize", "pretrain", "index", "finetune", "prune"}


def test_a_dry_run_needs_no_cluster_and_writes_nothing(chain, tmp_path, monkeypatch, capsys) -> None:
    run = chain()
    monkeypatch.setenv("PATH", "/nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert slurm.submit(run, dry_run=True) == []
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert printed.count("#!/bin/bash") == 6
    assert "'afterok:<tokenize>'" in printed


def test_the_kept_recipe_is_the_same_recipe(chain, programs, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    run = chain(
        model={"from": "model"},
        tokenize={"sources": ["text.txt", {"path": "text.txt", "text": "été"}], "deduplicate": None},
        pretrain={"objective": {"name": "mlm", "mask_rate": 0.2}, "betas": [0.9, 0.95], "eps": 1e-8, "loss_weights": {"mlm": 2}},
        slurm={"time": "04:00:00", "extra": ["--exclusive"], "stages": {"pack": {"memory": "4G"}}},
    )
    job = slurm.submit(run)[0]
    kept = recipe.load(job.text.with_name("recipe.yaml"))
    assert kept == run
    assert [step.fingerprint for step in workflow.resolve(kept)] == [step.fingerprint for step in workflow.resolve(run)]
    assert slurm.job_settings(kept, "pack") == slurm.job_settings(run, "pack")


def test_stages_are_chained_and_what_was_submitted_is_kept(chain, programs, tmp_path) -> None:
    jobs = slurm.submit(chain())
    assert [job.number for job in jobs] == ["101", "102", "103", "104", "105", "106"]
    assert (tmp_path / "submitted").read_text().split() == [str(job.text) for job in jobs]
    assert [option for option in options(jobs[3].text.read_text()) if "dependency" in option] == ["--dependency=afterok:103"]
    assert jobs[0].text.with_name("shared.sh").is_file()


def publish(run, stage: str) -> None:
    step = next(step for step in workflow.resolve(run) if step.stage == stage)
    with artifacts.working(run.directory, stage, step.fingerprint) as partial:
        artifacts.publish(
            partial, stage=stage, digest=step.fingerprint, settings=step.settings, inputs=step.inputs, metrics={"tokens": 1234}, started=0.0
        )


def test_stages_that_are_made_or_queued_are_not_submitted_again(chain, programs, capsys) -> None:
    run = chain()
    publish(run, "tokenize")
    assert [job.stage for job in slurm.submit(run)] == run.stages[1:]
    programs(squeue="echo '102|PENDING|Resources'; echo '101|RUNNING|None'")
    jobs = slurm.submit(run)
    assert [job.stage for job in jobs] == ["finetune", "prune", "evaluate"]
    assert "--dependency=afterok:102" in jobs[0].text.read_text()
    assert "pack      is in the queue already: job 101" in capsys.readouterr().out


def test_a_refused_job_cancels_those_before_it_and_tells_what_slurm_said(chain, programs, tmp_path) -> None:
    run = chain()
    programs(sbatch="case $2 in *pretrain*) echo 'sbatch: error: invalid partition specified: gqu' >&2; exit 1;; esac; echo 7")
    with pytest.raises(UserError, match="sbatch refused pretrain: error: invalid partition specified: gqu") as told:
        slurm.submit(run)
    assert str(tmp_path / "runs") not in str(told.value)  # paths as the recipe writes them
    assert "pretrain.sbatch" in str(told.value)
    assert (tmp_path / "cancelled").read_text() == "7 7\n"


def test_without_sbatch_the_message_says_what_to_do(chain, monkeypatch, tmp_path) -> None:
    run = chain()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sbatch is not on PATH: .* trimline run"):
        slurm.submit(run)


def test_an_unknown_stage_in_the_slurm_section_is_told(chain, programs) -> None:
    with pytest.raises(UserError, match=r"slurm\.stages: unknown stage pretrian; known: tokenize, pack"):
        slurm.submit(chain(slurm={"stages": {"pretrian": {"nodes": 2}}}))


def test_status_tells_done_running_queued_and_why_not(chain, programs, monkeypatch) -> None:
    run = chain()
    publish(run, "tokenize")
    slurm.submit(run)
    programs(squeue="echo '102|RUNNING|None'; echo '103|PENDING|Dependency'")
    pretrain = run.directory / "logs" / workflow.resolve(run)[2].name / "metrics.jsonl"
    pretrain.parent.mkdir(parents=True)
    pretrain.write_text(json.dumps({"step": 10, "loss": 9, "rows_per_second": 16}) + "\n" + json.dumps({"step": 20, "loss": 6.25}) + "\n")
    rows = {row[0]: row for row in slurm.status(run)}
    assert rows["tokenize"][1] == "done"
    assert rows["tokenize"][3] == "tokens 1,234"
    assert rows["pack"][1].startswith("not made yet; job 101 ended, see runs/run/logs/slurm/pack-101.out")
    assert rows["pretrain"][1] == "running: job 102"
    assert rows["pretrain"][3] == "step 20 of 1000, loss 6.25, 33 min left"  # 980 steps of 32 rows
    assert rows["finetune"][1] == "queued: job 103 (Dependency)"
    monkeypatch.setenv("PATH", "/nowhere")
    assert {row[0]: row[1] for row in slurm.status(run)}["prune"].startswith("not made yet")


def test_status_sees_a_stage_that_runs_here(chain) -> None:
    run = chain()
    step = workflow.resolve(run)[0]
    with artifacts.working(run.directory, step.stage, step.fingerprint):
        assert slurm.status(run)[0][1] == "running"
    assert slurm.status(run)[0][1] == "unfinished: resumes"


def test_a_directory_with_a_space_reaches_the_script_whole(chain, tmp_path, monkeypatch) -> None:
    run = chain(runs_dir="my runs")
    text = slurm.render(run, Path("my runs/recipe.yaml"), "pack")
    assert f"--output='{tmp_path}/my runs/run/logs/slurm/pack-%j.out'" in options(text)
    exports = "\n".join(line for line in text.splitlines() if line.startswith("export "))
    told = subprocess.run(["bash", "-c", f"{exports}; echo $TRIMLINE_RECIPE"], capture_output=True, text=True, env=dict(os.environ)).stdout
    assert told == f"{tmp_path}/my runs/recipe.yaml\n"
