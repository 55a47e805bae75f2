"""Where a model runs."""

from __future__ import annotations

import torch


def of_rank(rank: int) -> torch.device:
    """A GPU of its own for each rank of a machine, where it has any; else the CPU."""
    gpus = torch.cuda.device_count()
    return torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
