"""Which rank this process is, from the environment of whoever started it."""

from __future__ import annotations

import os
from dataclasses import dataclass


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
        if "OMPI_COMM_WORLD_SIZE" in os.environ or "PMIX_RANK" in os.environ or "PMI_RANK" in os.environ:
            from mpi4py import MPI

            return cls(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), "mpi")
        return cls()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.by == "mpi":
            from mpi4py import MPI

            MPI.COMM_WORLD.Barrier()
        elif self.by == "torch":
            import torch.distributed

            if torch.distributed.is_initialized():
                torch.distributed.barrier()
