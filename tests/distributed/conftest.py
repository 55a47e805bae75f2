"""Starting ranks as users do: through the real DeepSpeed launcher, or one rank alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launched:
    code: int
    output: str
    results: dict[str, Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_script(script: Path, arguments: list[str], ranks: int, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs a script on `ranks` ranks by the deepspeed launcher; with one rank by Python alone, with nothing set for a rendezvous."""
    environment = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    paths = [str(Path(sys.executable).parent), environment.get("PATH", "")]
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "PATH": os.pathsep.join(paths)}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    launcher += ["--no_local_rank"]
    command = [*(launcher if ranks > 1 else [sys.executable]), str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]], int], Launched]:
    """Runs trainings (see toy.py) one after another in one start of the ranks."""

    def run(trainings: list[dict[str, Any]], ranks: int) -> Launched:
        where = tmp_path_factory.mktemp("launch")
        (where / "trainings.json").write_text(json.dumps(trainings))
        done = launch_script(HERE / "toy.py", [str(where / "trainings.json"), str(where / "results.json")], ranks)
        results = where / "results.json"
        return Launched(done.returncode, done.stdout + done.stderr, json.loads(results.read_text()) if results.exists() else {})

    return run


@pytest.fixture(scope="session")
def launch_ranks() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs any script on ranks: (script, arguments, ranks)."""
    return launch_script
