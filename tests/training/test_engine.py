"""How ranks are joined."""

from datetime import timedelta

import torch

from pipeline.training import engine


def test_ranks_wait_for_the_first_for_hours():
    """It alone scores models and writes down what a teacher says; DeepSpeed's ten minutes end that, and every resume of it."""
    engine.start()
    backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options._timeout >= timedelta(hours=12)
