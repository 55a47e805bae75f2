"""Recipes, shortened, from raw text to a report on two nodes: real stages, MPI ranks and DeepSpeed ranks under srun."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

SHORT = (
    "tokenize.sources=[{here}/text.txt]",
    "tokenize.vocab_size=512",
    "tokenize.validation=0.1",
    "pack.length=32",
    "model={{layers: 2, hidden: 32, heads: 2, ffn: 64, max_length: 32}}",
    "pretrain.steps=120",
    "pretrain.batch_size=8",
    "pretrain.micro_batch_size=4",
    "pretrain.log_every=5",
    "finetune.task={{train: {here}/task.tsv, max_length: 32}}",
    "finetune.batch_size=16",
    "prune.batch_size=16",
    "prune.recovery.batch_size=16",
    "evaluate.latency={{batch_size: 2, length: 32, repeats: 3}}",
    "slurm.nodes=2",
    "slurm.tasks_per_node=1",
)


MEMORY = (
    "tokenize.sources=[{here}/text.txt]",
    "tokenize.vocab_size=512",
    "tokenize.validation=0.1",
    "pack.length=32",
    "pack.group_size=4",
    "model.layers=2",
    "model.hidden=32",
    "model.heads=2",
    "model.ffn=64",
    "model.max_length=32",
    "pretrain.steps=40",
    "pretrain.batch_size=8",
    "pretrain.ranks_per_group=2",
    "index={{max_keys: 3000, shard_keys: 500, window: {{block: 16, context: 16}}}}",
    "evaluate={{memory: [none, local+long+external], window: {{block: 16, context: 16}}, max_tokens: 3000}}",
    "slurm.nodes=2",
    "slurm.tasks_per_node=1",
)


def write_text(directory: Path) -> None:
    documents = {text for module in list(sys.modules.values()) if (text := inspect.getdoc(module))}
    (directory / "text.txt").write_text("\n\n".join(sorted(text.replace("\n\n", "\n") for text in documents)))


def told(run: Path) -> str:
    return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted((run / "logs" / "slurm").glob("*.out")))


def test_groups_that_lie_on_two_nodes_and_a_datastore_that_both_make(cluster, tmp_path: Path) -> None:
    write_text(tmp_path)
    overrides = [override.format(here=tmp_path) for override in MEMORY]
    command = (sys.executable, "-m", "pipeline", "submit", "recipes/trime-demo-ext.yaml", f"runs_dir={tmp_path}/runs", *overrides)
    run = tmp_path / "runs" / "trime-demo"
    jobs = {line.split()[0]: line.split()[2].rstrip(":") for line in cluster.call(*command).stdout.splitlines()}
    assert list(jobs) == ["tokenize", "pack", "pretrain", "index", "evaluate"]
    assert cluster.ended(jobs["evaluate"], seconds=300) == "COMPLETED", told(run)
    assert all(cluster.job(jobs[stage])["NodeList"] == "n[1-2]" for stage in ("pretrain", "index"))
    (log,) = (run / "logs" / "slurm").glob(f"index-{jobs['index']}.out")
    assert "shard 1 of" in log.read_text()
    (metrics,) = run.glob("logs/pretrain-*/metrics.jsonl")
    assert json.loads(metrics.read_text().splitlines()[-1])["losses"]["memory_share"] > 0
    (report,) = run.glob("evaluate-????????/report.json")
    rows = {row["memory"]: row["perplexity"] for row in json.loads(report.read_text())["memories"]["rows"]}
    assert rows["local+long+external"] < rows["none"]


def test_the_shortened_demo_runs_to_its_report_on_two_nodes_though_pretraining_is_stopped_once(cluster, tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "task.tsv").write_text("text\tlabel\n" + "".join(f"example {number} is {number % 2}\t{number % 2}\n" for number in range(96)))
    overrides = [override.format(here=tmp_path) for override in SHORT]
    command = (sys.executable, "-m", "pipeline", "submit", "recipes/demo.yaml", f"runs_dir={tmp_path}/runs", *overrides)
    run = tmp_path / "runs" / "demo"
    jobs = {line.split()[0]: line.split()[2].rstrip(":") for line in cluster.call(*command).stdout.splitlines()}
    assert list(jobs) == ["tokenize", "pack", "pretrain", "finetune", "prune", "evaluate"]

    def trained_or_failed() -> bool:
        return any(run.glob("logs/pretrain-*/metrics.jsonl")) or cluster.job(jobs["pretrain"])["JobState"] not in ("PENDING", "RUNNING")

    cluster.wait(trained_or_failed, "pretraining", 300)
    assert cluster.job(jobs["pretrain"])["JobState"] == "RUNNING", told(run)
    cluster.call("scancel", "--signal=USR2", jobs["pretrain"])
    cluster.resume(jobs["pretrain"])

    assert cluster.ended(jobs["evaluate"], seconds=300) == "COMPLETED", told(run)
    nodes = {stage: cluster.job(job)["NodeList"] for stage, job in jobs.items()}
    assert all(nodes[stage] == "n[1-2]" for stage in jobs if stage != "evaluate")
    (metrics,) = run.glob("logs/pretrain-*/metrics.jsonl")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 121))
    (report,) = run.glob("evaluate-????????/report.json")
    assert json.loads(report.read_text())
    assert cluster.call(*command).stdout.count("is up to date") == 6
