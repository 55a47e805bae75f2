"""The demo's recipe, shortened, from raw text to a report on two nodes: real stages, MPI ranks and DeepSpeed ranks under srun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SHORT = (
    "tokenize.sources=[text]",
    "tokenize.vocab_size=512",
    "pack.length=32",
    "model={layers: 2, hidden: 32, heads: 2, ffn: 64, max_length: 64}",
    "pretrain.steps=6",
    "pretrain.batch_size=8",
    "pretrain.micro_batch_size=4",
    "finetune.task.max_train=64",
    "finetune.epochs=1",
    "prune.epochs=2",
    "prune.recovery.epochs=1",
    "evaluate.max_segments=16",
    "evaluate.latency={batch_size: 2, length: 32, repeats: 3}",
    "slurm.nodes=2",
    "slurm.tasks_per_node=1",
)


def test_the_shortened_demo_runs_to_its_report_on_two_nodes(cluster, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(str(getattr(__builtins__, "__doc__", "")) + module.__doc__ for module in list(sys.modules.values()) if module.__doc__))
    overrides = [override.replace("[text]", f"[{text}]") for override in SHORT]
    command = (sys.executable, "-m", "pipeline", "submit", "recipes/demo.yaml", f"runs_dir={tmp_path}/runs", *overrides)
    printed = cluster.call(*command).stdout
    jobs = {line.split()[0]: line.split()[2].rstrip(":") for line in printed.splitlines()}
    assert list(jobs) == ["tokenize", "pack", "pretrain", "finetune", "prune", "evaluate"]
    state = cluster.ended(jobs["evaluate"], seconds=400)
    logs = sorted((tmp_path / "runs/demo/logs/slurm").glob("*.out"))
    assert state == "COMPLETED", "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)
    report = next((tmp_path / "runs/demo").glob("evaluate-????????/report.json"))
    assert json.loads(report.read_text())
    nodes = {stage: cluster.job(job)["NodeList"] for stage, job in jobs.items()}
    assert nodes == dict.fromkeys(["tokenize", "pack", "pretrain", "finetune", "prune"], "n[1-2]") | {"evaluate": nodes["evaluate"]}
    assert "up to date" in cluster.call(*command).stdout.splitlines()[-1]
