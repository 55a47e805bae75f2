"""Which rank this process is, from the environment of whoever started it."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

STOPPED = 85
"""Exit code of a stage that a signal stopped and that goes on from there when it is run again."""

TOLD = "TRIMLINE_TOLD"
"""Environment variable: a file that the first rank with something to tell creates."""

STARTER = "TRIMLINE_STARTER"
"""Environment variable: number of the process that the ranks must not outlive."""


@dataclass(frozen=True)
class Ranks:
    """One process among `size`. Started by DeepSpeed or srun (RANK, WORLD_SIZE), by mpirun or PMIx, or alone."""

    rank: int = 0
    size: int = 1
    by: str = "alone"
    """`torch`: DeepSpeed's or srun's ranks, which meet in torch.distributed; `mpi`: ranks that meet in MPI; `alone`."""

    @classmethod
    def here(cls) -> Ranks:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "torch")
        if _mpi_size() > 1:
            from mpi4py import MPI

            return cls(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), "mpi")
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def threads(self) -> int:
        """Cores for this rank: those it may use, shared with the other MPI ranks of this machine where nobody has bound each to its own."""
        cores = len(os.sched_getaffinity(0))
        together = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "1")
        return max(cores // together, 1) if cores == os.cpu_count() else cores

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size == 1:
            return
        if self.by == "mpi":
            from mpi4py import MPI

            MPI.COMM_WORLD.Barrier()
        elif self.by == "torch":
            import torch.distributed

            if torch.distributed.is_initialized():
                torch.distributed.barrier()


def _mpi_size() -> int:
    """Ranks that mpirun, or srun through PMIx or PMI, started; 1 where nobody did. Does not load MPI."""
    if "PMIX_RANK" in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:  # srun sets no size of its own for PMIx
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or "1")


def tell(message: str) -> None:
    """Print to standard error, once however many ranks say it."""
    if file := os.environ.get(TOLD):
        try:
            open(file, "x").close()
        except FileExistsError:
            return
        except OSError:  # better told twice than never
            pass
    print(message, file=sys.stderr, flush=True)


def end_with_starter() -> None:
    """Send this rank SIGTERM when the process that started the ranks is gone, so that a killed launcher leaves nothing running."""
    starter = os.environ.get(STARTER)
    if starter is None:
        return

    def watch() -> None:
        with contextlib.suppress(ProcessLookupError):
            select.select([os.pidfd_open(int(starter))], [], [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="end with starter", daemon=True).start()


def stop_at_once() -> None:
    """Make SIGTERM and SIGUSR2 end this process with code 85: for stages that resume from the files they have finished."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: os._exit(STOPPED))


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Around all that a rank does: where it met the others through gloo, the process ends with the block, without the interpreter's own end.

    There a thread of gloo that still lets go of the last collective's tensor aborts a rank whose work is done, now and
    then (pytorch/pytorch#190489); destroying the process group does not end those threads. NCCL asks that it is.
    """
    code: object = None
    try:
        yield
    except SystemExit as end:
        code = end.code
    except BaseException:
        if _backend() != "gloo":
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if _backend() == "nccl" and not code:
        sys.modules["torch.distributed"].destroy_process_group()
    if _backend() != "gloo":
        sys.exit(code)  # type: ignore[arg-type]
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _backend() -> str | None:
    """What torch.distributed meets through, where it was started."""
    distributed = sys.modules.get("torch.distributed")
    return str(distributed.get_backend()) if distributed is not None and distributed.is_initialized() else None
