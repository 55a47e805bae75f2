"""Who this process is, and what ranks do for one another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.launch import ranks
from pipeline.launch.ranks import Ranks

NAMES = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, Ranks(0, 1, "alone")),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Ranks(3, 8, "torch")),
        ({"RANK": "3", "WORLD_SIZE": "8", "PMIX_RANK": "3", "SLURM_STEP_NUM_TASKS": "8"}, Ranks(3, 8, "torch")),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}, Ranks(0, 1, "alone")),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, Ranks(0, 1, "alone")),
        ({"RANK": "3"}, Ranks(0, 1, "alone")),
    ],
)
def test_the_environment_says_which_rank_this_is(monkeypatch, env, found) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert Ranks.here() == found


def test_what_every_rank_tells_is_told_once(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setenv(ranks.TOLD, str(tmp_path / "told"))
    ranks.tell("the corpus is empty")
    ranks.tell("the corpus is empty")
    assert capsys.readouterr().err == "the corpus is empty\n"
    monkeypatch.setenv(ranks.TOLD, str(tmp_path / "gone" / "told"))
    ranks.tell("told in any case")
    assert capsys.readouterr().err == "told in any case\n"


def _rank(code: str, **env: str) -> subprocess.Popen[str]:
    code = f"import time; from pipeline.launch import ranks; {code}; print('ready', flush=True); time.sleep(30)"
    rank = subprocess.Popen([sys.executable, "-c", code], env=os.environ | env, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert rank.stdout is not None
    assert rank.stdout.readline() == "ready\n"
    return rank


def test_a_rank_ends_when_its_starter_is_killed() -> None:
    starter = subprocess.Popen(["sleep", "30"])
    rank = _rank("ranks.end_with_starter()", **{ranks.STARTER: str(starter.pid)})
    assert rank.poll() is None
    starter.kill()
    starter.wait()
    assert rank.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_stage_that_resumes_from_its_files_stops_at_once_with_85(number) -> None:
    rank = _rank("ranks.stop_at_once()")
    rank.send_signal(number)
    assert rank.wait(10) == ranks.STOPPED
