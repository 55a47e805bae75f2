"""Who this process is, and what ranks do for one another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        ("pass", 0, ""),
        ("sys.exit(85)", 85, ""),
        ("sys.exit('no space')", 1, "no space\n"),
        ("raise RuntimeError('broken')", 1, "RuntimeError: broken\n"),
    ],
)
def test_a_rank_that_met_others_through_gloo_leaves_with_its_code_and_words_without_the_interpreters_end(ending, code, told) -> None:
    meet = "from pipeline.training import engine; engine.start()"
    left = _left(meet, ending)
    assert (left.returncode, left.stdout) == (code, "said\nat exit\n")
    assert left.stderr.endswith(told)
    assert ("Traceback" in left.stderr) == ("raise" in ending)


def test_a_process_without_gloo_ends_as_any_other() -> None:
    left = _left("pass", "sys.exit(3)")
    assert (left.returncode, left.stdout) == (3, "said\nat exit\nfinalized\n")


def _left(meet: str, ending: str) -> subprocess.CompletedProcess[str]:
    code = f"""
import atexit, os, sys
from pipeline.launch.ranks import leaving
class Last:
    def __del__(self, write=os.write): write(1, b"finalized\\n")
{meet}
last = Last()
atexit.register(print, "at exit")
with leaving():
    print("said")
    {ending}
"""
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=root, timeout=120, check=False)


@pytest.mark.parametrize(("code", "destroyed"), [(None, 1), (0, 1), (2, 0), ("told", 0)])
def test_ranks_that_met_through_nccl_end_their_group_where_all_went_well(monkeypatch, code, destroyed) -> None:
    ended: list[int] = []
    met = SimpleNamespace(is_initialized=lambda: True, get_backend=lambda: "nccl", destroy_process_group=lambda: ended.append(1))
    monkeypatch.setitem(sys.modules, "torch.distributed", met)
    with pytest.raises(SystemExit) as left, ranks.leaving():
        sys.exit(code)
    assert (left.value.code, len(ended)) == (code, destroyed)
    with pytest.raises(KeyError), ranks.leaving():
        raise KeyError
    assert len(ended) == destroyed
