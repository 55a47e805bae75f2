"""Ranks of this machine through the real launchers. The ranks are small programs in place of Trimline's own command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch import local

RANK = """\
import os, pathlib, signal, sys, time
stage, recipe, *overrides = sys.argv[1:]
rank = os.environ.get("RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
here = pathlib.Path(os.environ["HERE"])
names = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "DS_ACCELERATOR")
(here / f"rank-{rank}").write_text(" ".join([str(os.getpid()), *sys.argv[1:], *(f"{name}={os.environ.get(name)}" for name in names)]))
def stop(number, frame):
    if os.environ["DO"] == "save":
        time.sleep(0.3 * int(rank))
        (here / f"saved-{rank}").touch()
        os._exit(85)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(number, stop)
if os.environ["DO"].isdecimal():
    if os.environ["DO"] == "2":
        from pipeline_here.launch.ranks import tell
        tell("told by a rank")
    os._exit(int(os.environ["DO"]))
time.sleep(120)
"""

STARTER = """\
import sys
from pathlib import Path
from pipeline import recipe
from pipeline.launch import local
import os
os.environ["PYTHONPATH"] = os.environ["HERE"]
os.chdir(os.environ["HERE"])
sys.exit(local.start(recipe.load(os.environ["HERE"] + "/recipe.yaml"), sys.argv[1], Path("recipe.yaml"), ["pretrain.steps=3"]))
"""


@pytest.fixture
def start(chain, tmp_path: Path) -> Callable[[str, str], subprocess.Popen[str]]:
    """Starts two ranks of a stage in a process of its own; `do`: an exit code, `save` (85 on a signal) or `stay` (no signal ends it)."""
    chain(tokenize={"sources": ["text.txt"], "ranks": 2}, pretrain={"ranks": 2})
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").touch()
    (tmp_path / "pipeline" / "__main__.py").write_text(RANK)
    root = Path(__file__).parents[2]
    (tmp_path / "pipeline_here").symlink_to(root / "pipeline")
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"HERE": str(tmp_path), "PYTHONPATH": str(root)}

    def begin(stage: str, do: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", STARTER, stage]
        return subprocess.Popen(command, cwd=root, env=env | {"DO": do}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return begin


def ranks_of(starter: subprocess.Popen[str], tmp_path: Path) -> list[list[str]]:
    """What each rank was given: its process number, its arguments, its environment."""
    end = time.monotonic() + 90
    while not all((tmp_path / f"rank-{rank}").exists() and (tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)):
        assert starter.poll() in (None, 0), starter.communicate()[0]
        assert time.monotonic() < end, "the ranks did not start"
        time.sleep(0.1)
    return [(tmp_path / f"rank-{rank}").read_text().split() for rank in (0, 1)]


def gone(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def check_given(ranks: list[list[str]], stage: str, size: str) -> None:
    for rank in ranks:
        assert rank[1:4] == [stage, "recipe.yaml", "pretrain.steps=3"]
        assert {size, f"OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)) // 2)}"} <= set(rank)
        assert "DS_ACCELERATOR=cpu" in rank or local.devices()


def test_mpi_ranks_are_given_their_stage_recipe_and_overrides_and_share_the_cores(start, tmp_path) -> None:
    starter = start("tokenize", "0")
    assert starter.communicate(timeout=60)[0] == ""
    assert starter.returncode == 0
    check_given(ranks_of(starter, tmp_path), "tokenize", "OMPI_COMM_WORLD_SIZE=2")


@pytest.mark.parametrize("stage", ["pretrain", "tokenize"])
def test_a_mistake_is_told_once_and_nothing_else(start, stage) -> None:
    starter = start(stage, "2")
    assert starter.communicate(timeout=120)[0] == "told by a rank\n"
    assert starter.returncode == 2


def test_deepspeeds_ranks_are_given_the_same_and_save_on_a_signal_which_ends_in_85(start, tmp_path) -> None:
    starter = start("pretrain", "save")
    check_given(ranks_of(starter, tmp_path), "pretrain", "WORLD_SIZE=2")
    starter.send_signal(signal.SIGUSR2)  # the launcher alone would die of it and leave its ranks
    printed = starter.communicate(timeout=60)[0]
    assert starter.returncode == 85
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()
    assert printed.count("stopping") == 1


def test_a_second_signal_kills(start, tmp_path) -> None:
    starter = start("pretrain", "stay")
    processes = [rank[0] for rank in ranks_of(starter, tmp_path)]
    starter.send_signal(signal.SIGINT)
    assert starter.stdout.readline() == "\n"
    assert "stopping" in starter.stdout.readline()
    starter.send_signal(signal.SIGINT)
    starter.communicate(timeout=20)
    assert all(gone(process) for process in processes)


def test_a_killed_launcher_leaves_no_rank(start, tmp_path) -> None:
    starter = start("pretrain", "save")
    processes = [rank[0] for rank in ranks_of(starter, tmp_path)]
    launcher = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()[0]
    os.kill(int(launcher), signal.SIGKILL)
    starter.communicate(timeout=60)
    assert starter.returncode == 128 + signal.SIGKILL
    assert all(gone(process) for process in processes)
    assert (tmp_path / "saved-0").exists()


def test_one_process_needs_no_launcher(chain) -> None:
    run = chain(pack={"ranks": 2})
    assert [stage for stage in run.stages if local.in_process(run, stage)] == ["tokenize", "evaluate"]


def test_gpus_are_those_that_cuda_visible_devices_names(monkeypatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path(f"/dev/nvidia{number}") for number in range(4)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert local.devices() == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert local.devices() == ["3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.devices() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f")
    with pytest.raises(UserError, match="takes numbers"):
        local.devices()


def test_more_ranks_than_gpus_are_refused(chain, monkeypatch) -> None:
    monkeypatch.setattr(local, "devices", lambda: ["0", "1"])
    with pytest.raises(UserError, match=r"pretrain\.ranks is 3, but this machine offers 2 GPUs \(0, 1\); set pretrain.ranks=2"):
        local.start(chain(pretrain={"ranks": 3}), "pretrain", Path("recipe.yaml"), [])


def test_mpi_ranks_without_mpirun_are_refused(chain, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="needs mpirun, and there is none"):
        local.start(chain(pack={"ranks": 2}), "pack", Path("recipe.yaml"), [])
